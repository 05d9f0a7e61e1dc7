"""Decides about every site: rewrite it, or leave it dense and say why. Nothing is changed here.

A decision depends on the options, on dtypes and on static sizes only (never on a batch size, which may differ between ranks), so that
all ranks decide alike.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from dct_compile import cost
from dct_compile.config import DCTConfig
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.reasons import Reason
from dct_compile.passes.sites import Segment, Site
from dct_compile.triton_kernels.layout import GradientLayout, choose_block, quantized_row_bytes, row_bytes

COMPRESSIBLE = (torch.float32, torch.bfloat16, torch.float16)
TWINS = {
    "all_to_all_single": "all_to_all_single",
    "all_gather_into_tensor": "reduce_scatter_tensor",
    "reduce_scatter_tensor": "all_gather_into_tensor",
    "all_reduce": "all_reduce",
}
"""Which collective carries the gradient of which."""
QUANTIZED_BITS = {"int8": 8, "int4": 4}
MAX_ROW = 16384


@dataclass(frozen=True)
class GradientPlan:
    """How a gradient buffer of ``numel`` elements travels. ``owner_layout``: this rank's share under "owner", ``None`` under "gather"."""

    numel: int
    compressed: tuple[Segment, ...]
    dense: tuple[Segment, ...]
    layout: GradientLayout
    owner_layout: GradientLayout | None


@dataclass(frozen=True)
class Decision:
    """The verdict on one site.

    ``codec`` is "dense", "gradient" (threshold with error feedback), "mask" (row threshold; the backward reuses the forward's mask) or
    "quantize". ``slots`` are the entries kept of each row, ``bits`` those of a quantised element. Bytes are per rank and call;
    ``gather_bytes`` and ``owner_bytes`` are what either scheme sends for a gradient with a payload.
    """

    site: Site
    codec: str
    reason: str
    dense_bytes: int
    wire_bytes: int
    slots: int = 0
    bits: int = 0
    gradient: GradientPlan | None = None
    gather_bytes: int | None = None
    owner_bytes: int | None = None

    @property
    def compressed(self) -> bool:
        return self.codec != "dense"

    def signature(self) -> str:
        """What must be equal on all ranks of the group: everything but the leading dimension."""
        tensor = self.site.tensor
        shape = "x".join(map(str, tensor.shape[1:])) if tensor is not None and not self.site.segments else ""
        sizes = ",".join(f"{segment.parameter.numel}" for segment in self.site.segments)
        dtype = _name(tensor.dtype) if tensor is not None else ""
        return f"{self.site.collective} {self.site.kind} {dtype} [{shape or sizes}] {self.codec} slots={self.slots} bits={self.bits}"


def plan(sites: Sequence[Site], config: DCTConfig, training: bool) -> list[Decision]:
    """One decision per site, in the same order."""
    backward = {id(site.twin): site for site in sites if site.twin is not None}
    decisions: dict[int, Decision] = {}
    for site in sites:
        if site.kind == "gradient":
            decisions[id(site)] = _plan_gradient(site, config)
        elif site.twin is not None:
            decisions[id(site)] = _follow_twin(site, decisions[id(site.twin)], config)
        else:
            decisions[id(site)] = _plan_forward(site, backward.get(id(site)), config, training)
    return [decisions[id(site)] for site in sites]


def dense(site: Site, reason: str) -> Decision:
    """The decision to leave ``site`` as it is."""
    size = dense_bytes(site)
    return Decision(site, "dense", str(reason), size, size)


def dense_bytes(site: Site) -> int:
    """What the untouched collective sends, per rank and call."""
    tensor = site.tensor
    if tensor is None:
        inputs = site.node.args[0] if isinstance(site.node.args[0], list | tuple) else []
        values = [value for item in inputs if isinstance(item, torch.fx.Node) and (value := gu.value(item)) is not None]
        return cost.sent_bytes(site.collective, sum(gu.numel_hint(value) * value.itemsize for value in values), site.group_size)
    return _sent(site, gu.numel_hint(tensor) * tensor.itemsize)


def _sent(site: Site, input_bytes: int) -> int:
    if site.collective == "all_to_all_single":
        splits = gu.argument(site.node, "input_split_sizes")
        if len(splits) == site.group_size and all(isinstance(split, int) for split in splits):
            return round(input_bytes * cost.share_leaving(splits, site.group_rank))
    return cost.sent_bytes(site.collective, input_bytes, site.group_size)


def _unsupported(site: Site) -> str | None:
    """Why no codec can carry this collective."""
    tensor = site.tensor
    if site.group_size == 1:
        return Reason.ONE_RANK
    if site.collective not in TWINS:
        return Reason.COLLECTIVE.format(collective=site.collective)
    if any(user.target is not gu.WAIT for user in site.node.users):
        return Reason.NOT_WAITED
    if tensor is None:
        return Reason.UNKNOWN_SHAPE
    if tensor.dtype not in COMPRESSIBLE:
        return Reason.DTYPE.format(dtype=_name(tensor.dtype))
    if site.collective in ("all_reduce", "reduce_scatter_tensor") and gu.argument(site.node, "reduce_op").lower() not in ("sum", "avg"):
        return Reason.REDUCE_OP.format(op=gu.argument(site.node, "reduce_op"))
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan_gradient(site: Site, config: DCTConfig) -> Decision:
    reason = _unsupported(site)
    if reason is None and site.collective != "all_reduce":
        reason = Reason.GRADIENT_COLLECTIVE.format(collective=site.collective)
    if reason is None and not site.segments:
        reason = Reason.WHOSE_GRADIENT
    if reason is None and config.dp_density == 1:
        reason = Reason.DP_DENSITY_ONE
    if reason is not None:
        return dense(site, reason)
    reasons = {segment: _exempt(segment, config) for segment in site.segments}
    compressed = tuple(segment for segment in site.segments if reasons[segment] is None)
    rest = tuple(segment for segment in site.segments if reasons[segment] is not None)
    if not compressed:
        return dense(site, "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason is not None)))
    assert site.tensor is not None
    numel = gu.numel_hint(site.tensor)
    size, rank = site.group_size, site.group_rank
    gather = gradient_layout_of(compressed, 1, config)
    owner = gradient_layout_of(compressed, size, config)
    gather_bytes, owner_bytes = cost.gather_bytes(gather, size), cost.owner_bytes(owner, size)
    by_owner = config.all_reduce == "owner" or (config.all_reduce == "auto" and owner_bytes < gather_bytes)
    remainder = cost.sent_bytes("all_reduce", sum(segment.parameter.numel for segment in rest) * site.tensor.itemsize, size)
    gather_bytes, owner_bytes = gather_bytes + remainder, owner_bytes + remainder
    wire_bytes = owner_bytes if by_owner else gather_bytes
    full_bytes = dense_bytes(site)
    scheme = "owner" if by_owner else "gather"
    if wire_bytes >= full_bytes:
        reason = Reason.GRADIENT_TOO_LARGE.format(scheme=scheme, ranks=size, wire=wire_bytes, dense=full_bytes)
        return replace(dense(site, reason), gather_bytes=gather_bytes, owner_bytes=owner_bytes)
    layout = owner if by_owner else gather
    owner_layout = (
        GradientLayout(layout.segments, layout.block, layout.chunks, rank, layout.capacity_fraction, layout.value_dtype)
        if by_owner
        else None
    )
    names = ", ".join(segment.parameter.name for segment in rest)
    what = (Reason.GRADIENT_BUT if rest else Reason.GRADIENT).format(scheme=scheme, density=config.dp_density, names=names)
    return Decision(
        site,
        "gradient",
        what,
        full_bytes,
        wire_bytes,
        gradient=GradientPlan(numel, compressed, rest, layout, owner_layout),
        gather_bytes=gather_bytes,
        owner_bytes=owner_bytes,
    )


def gradient_layout_of(compressed: Sequence[Segment], chunks: int, config: DCTConfig) -> GradientLayout:
    """The payload geometry of a bucket's compressed segments."""
    return GradientLayout(
        tuple((segment.offset, segment.parameter.numel) for segment in compressed),
        choose_block(config.dp_density, max(segment.parameter.numel for segment in compressed)),
        chunks,
        -1,
        min(1.0, config.dp_density * config.capacity_factor),
        config.dp_dtype,
    )


def _exempt(segment: Segment, config: DCTConfig) -> str | None:
    if segment.parameter.numel < config.min_numel:
        return Reason.MIN_NUMEL.format(min_numel=config.min_numel)
    for pattern in config.exempt:
        if fnmatch.fnmatchcase(segment.parameter.name, pattern):
            return Reason.EXEMPT.format(pattern=pattern)
    return None


def _plan_forward(site: Site, twin: Site | None, config: DCTConfig, training: bool) -> Decision:
    reason = _unsupported(site)
    if reason is not None:
        return dense(site, reason)
    if site.kind == "activation_gradient":
        return dense(site, Reason.NO_FORWARD)
    if site.kind == "other":
        return dense(site, Reason.PARAMETERS)
    if site.origin == "foreign":
        return dense(site, Reason.FOREIGN)
    if not training and not config.mp_eval:
        return dense(site, Reason.EVALUATION)
    tensor = site.tensor
    assert tensor is not None
    if tensor.dim() < 2:
        return dense(site, Reason.NO_ROWS)
    if not all(isinstance(size, int) for size in tensor.shape[1:]):
        return dense(site, Reason.DYNAMIC_WIDTH)
    if tensor.shape[-1] > MAX_ROW:
        return dense(site, Reason.WIDE_ROW.format(width=tensor.shape[-1], limit=MAX_ROW))
    if twin is not None and (reason := _mismatch(site, twin)) is not None:
        return dense(site, reason)
    if site.kind == "embedding" and config.embedding_codec == "dense":
        return dense(site, Reason.CODEC_DENSE)
    if site.kind == "embedding" and config.embedding_codec in QUANTIZED_BITS:
        return _quantized(site, tensor, QUANTIZED_BITS[config.embedding_codec])
    if training and twin is None and site.collective == "all_reduce" and site.local_gradient is None:
        return dense(site, Reason.NO_LOCAL_GRADIENT)
    return _masked(site, tensor, config)


def _mismatch(site: Site, twin: Site) -> str | None:
    if twin.collective != TWINS[site.collective]:
        return Reason.BACKWARD_COLLECTIVE.format(actual=twin.collective, expected=TWINS[site.collective])
    if twin.tensor is None or site.tensor is None or twin.tensor.shape[1:] != site.tensor.shape[1:]:
        return Reason.BACKWARD_SHAPE
    if twin.tensor.dtype not in COMPRESSIBLE:
        return Reason.BACKWARD_DTYPE.format(dtype=_name(twin.tensor.dtype))
    return None


def _rows(tensor: Tensor) -> int:
    """Rows (vectors of the last dimension), by the traced example's leading size."""
    return gu.numel_hint(tensor) // max(1, int(tensor.shape[-1]))


def _quantized(site: Site, tensor: Tensor, bits: int) -> Decision:
    payload = _rows(tensor) * quantized_row_bytes(tensor.shape[-1], bits)
    wire = _transported(site, payload)
    if not _pays(site, quantized_row_bytes(tensor.shape[-1], bits), tensor.shape[-1] * tensor.itemsize):
        return dense(site, Reason.QUANTIZED_TOO_LARGE.format(bits=bits, width=tensor.shape[-1]))
    return Decision(site, "quantize", Reason.QUANTIZED.format(bits=bits), dense_bytes(site), wire, bits=bits)


def _masked(site: Site, tensor: Tensor, config: DCTConfig) -> Decision:
    if config.mp_density == 1:
        return dense(site, Reason.MP_DENSITY_ONE)
    width = int(tensor.shape[-1])
    kept = ceil(config.mp_density * width)
    slots = kept if config.threshold_method in ("exact", "sampled") else min(width, ceil(kept * config.capacity_factor))
    if kept > 2 * config.mp_density * width:
        return dense(site, Reason.SHORT_ROW.format(width=width, density=config.mp_density))
    one_row = row_bytes(width, slots, config.mp_dtype)
    if not _pays(site, one_row, width * tensor.itemsize):
        return dense(site, Reason.ROW_TOO_LARGE.format(wire=one_row, dense=width * tensor.itemsize))
    return Decision(
        site,
        "mask",
        Reason.MASKED.format(slots=slots, width=width),
        dense_bytes(site),
        _transported(site, _rows(tensor) * one_row),
        slots=slots,
    )


def _pays(site: Site, encoded_row: int, dense_row: int) -> bool:
    """Whether a row sends fewer bytes encoded; an encoded all_reduce is a gather, whose bytes grow with the ranks."""
    gathered = site.group_size if site.collective == "all_reduce" else 2
    return encoded_row * gathered < dense_row * 2


def _transported(site: Site, payload_bytes: int) -> int:
    """Bytes on the wire of an encoded input: reductions cannot be summed while encoded, so they travel as gathers or exchanges."""
    if site.collective == "all_reduce":
        return cost.sent_bytes("all_gather", payload_bytes, site.group_size)
    return _sent(site, payload_bytes)


def _follow_twin(site: Site, forward: Decision, config: DCTConfig) -> Decision:
    """The backward of a masked collective sends the values at the forward's indices; that of a quantised one is quantised itself."""
    if not forward.compressed:
        return dense(site, Reason.DENSE_FORWARD.format(reason=forward.reason))
    tensor = site.tensor
    assert tensor is not None
    if forward.codec == "quantize":
        return _quantized(site, tensor, forward.bits)
    values = _rows(tensor) * forward.slots * config.mp_dtype.itemsize
    kinds = {"all_reduce": "all_gather", "all_gather_into_tensor": "all_gather"}
    wire = cost.sent_bytes(kinds[site.collective], values, site.group_size) if site.collective in kinds else _sent(site, values)
    return Decision(site, "mask", str(Reason.FOLLOWS_FORWARD), dense_bytes(site), wire, slots=forward.slots)
