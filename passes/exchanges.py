"""Makes the exchange of a site: the collective as the schemes need it, without its graph."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from dct_compile.exchange import ACTIVATION, BACKWARD_OF, EMBEDDING, PARAMETER, Exchange
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.device_copy import is_device_copy
from dct_compile.passes.sites import Site
from dct_compile.passes.source import module_path, source_line

_SPLITS = frozenset({gu.aten.split.Tensor, gu.aten.split_with_sizes.default})

_ROW_GRADIENTS = (BACKWARD_OF[ACTIVATION], BACKWARD_OF[EMBEDDING])


def exchanges_of(sites: Sequence[Site], training: bool) -> list[Exchange]:
    """Makes the exchanges of all sites of one graph.

    Args:
        sites: All sites of one graph.
        training: True if the graph has a backward.

    Returns:
        One exchange per site, in the same order. A forward one holds that of its backward.
    """
    plain = [_exchange(site, number, training) for number, site in enumerate(sites)]
    backward = {id(site.twin): exchange for site, exchange in zip(sites, plain, strict=True) if site.twin is not None}
    alone = {site.group_name for site in sites if site.kind in _ROW_GRADIENTS and site.twin is None}
    uneven = any(site.kind == PARAMETER and _is_cut(site) for site in sites)
    return [
        replace(exchange, backward=backward.get(id(site)), uneven=uneven, unpaired=site.group_name in alone)
        for site, exchange in zip(sites, plain, strict=True)
    ]


def _is_cut(site: Site) -> bool:
    """Returns whether the result of a gather is cut at once: then shards were padded, on ranks whose shard is shorter."""
    users = [user for wait in gu.waits(site.node) for user in wait.users]
    chunks = [chunk for user in users if user.target in _SPLITS for item in user.users for chunk in item.users]
    return any(user.target == gu.aten.slice.Tensor and _shortens(user) for user in (*users, *chunks))


def _shortens(node: fx.Node) -> bool:
    before, after = gu.value(node.args[0]), gu.value(node)  # type: ignore[arg-type]
    return before is not None and after is not None and gu.numel_hint(after) < gu.numel_hint(before)


def _exchange(site: Site, number: int, training: bool) -> Exchange:
    tensor = site.tensor
    return Exchange(
        site.collective,
        site.kind,
        site.name,
        tuple(gu.hint(size) for size in tensor.shape) if tensor is not None else None,
        tensor.dtype if tensor is not None else None,
        site.group_name,
        site.group_size,
        site.group_rank,
        _input_bytes(site),
        reduce_op=str(gu.optional_argument(site.node, "reduce_op") or "").lower(),
        splits=_static_splits(site),
        static_rows=tensor is None or all(isinstance(size, int) for size in tensor.shape[1:]),
        static_width=tensor is None or all(isinstance(size, int) for size in tensor.shape[-1:]),
        segments=site.segments,
        number=number,
        module=module_path(site.node),
        source=line.place if (line := source_line(site.node)) is not None else "",
        origin=site.origin,
        destination=site.destination,
        operator=site.operator,
        trains=training,
        local_gradient=site.local_gradient is not None,
        waited=is_device_copy(site.node) or all(user.target is gu.WAIT or user.target in gu.METADATA_OPS for user in site.node.users),
        used=bool(gu.waits(site.node)),
    )


def _input_bytes(site: Site) -> int:
    """Returns the bytes of all inputs that are sent, by the traced example where sizes are symbolic."""
    first: Any = site.node.args[0] if site.node.args else None
    if site.collective.name == "batch_p2p_ops":
        tensors: Any = gu.argument(site.node, "tensors")
        first = [tensor for operation, tensor in zip(first, tensors, strict=True) if operation == "isend"]
    nodes = [first] if isinstance(first, fx.Node) else first if isinstance(first, list | tuple) else []
    values = [value for node in nodes if isinstance(node, fx.Node) and (value := gu.value(node)) is not None]
    return sum(gu.numel_hint(value) * value.itemsize for value in values)


def _static_splits(site: Site) -> tuple[int, ...] | None:
    splits = gu.optional_argument(site.node, "input_split_sizes")
    if isinstance(splits, list | tuple) and len(splits) == site.group_size and all(isinstance(split, int) for split in splits):
        return tuple(splits)
    return None
