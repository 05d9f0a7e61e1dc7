"""Quantised blocks for sharded data parallelism: parameters on their way to all ranks, and their gradients on their way to the owners.

::

    whole = all_gather(shard)            codes    = dct.quantize_rows(shard in blocks, seed)
                                  ==>    received = all_gather_into_tensor(codes)
                                         whole    = dct.dequantize_rows(received)

    own = reduce_scatter(grad)           codes    = dct.quantize_rows(grad in blocks, seed)          one part for each owner
                                  ==>    received = all_to_all_single(codes)
                                         own      = dct.dequantize_rows(received).sum()              in float32

ZeRO++ sends weights in blocks (Wang et al. 2023, arXiv 2306.10209). Stochastic rounding is unbiased; QSDP proves convergence for weights
that are rounded so (Markov et al. 2023, arXiv 2302.02390). No state is kept.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_GATHER, ALL_TO_ALL, PARAMETER, SHARDED_GRADIENT, Exchange, Parameter
from dct_compile.reasons import Reason
from dct_compile.schemes.codecs import BITS
from dct_compile.schemes.members import divide
from dct_compile.schemes.offer import Declined, Offer
from dct_compile.schemes.quantized import seed_of
from dct_compile.traffic import Traffic
from dct_compile.triton_kernels.layout import quantized_row_bytes

dct = torch.ops.dct
BLOCK = 256
"""Elements that share a scale. No block holds elements of two parameters, whose magnitudes may differ."""
Span = tuple[int, int]
"""The offset and the elements of a parameter in a row."""


@dataclass(frozen=True)
class ShardCodec:
    """Encodes rows of parameters that lie end to end: one row for each rank that gets it.

    ``blocks``: the parameters that travel as codes of ``bits`` bits. ``rounded``: those that travel as bfloat16. ``exact``: the others.
    """

    blocks: tuple[Span, ...]
    rounded: tuple[Span, ...]
    exact: tuple[Span, ...]
    bits: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of a row."""
        return sum(numel for _, numel in (*self.blocks, *self.rounded, *self.exact))

    @property
    def payload_bytes(self) -> int:
        """Bytes of an encoded row."""
        count = sum(-(-numel // BLOCK) for _, numel in self.blocks)
        rounded, exact = (sum(numel for _, numel in spans) for spans in (self.rounded, self.exact))
        return count * quantized_row_bytes(BLOCK, self.bits) + 2 * rounded + self.dtype.itemsize * exact

    def of(self, numel: int) -> "ShardCodec":
        """Returns the codec of a row of ``numel`` elements: where it is not the one expected, a step has left out parameters."""
        whole: tuple[Span, ...] = ((0, numel),)
        if numel == self.numel:
            return self
        return replace(self, blocks=whole if self.blocks else (), rounded=() if self.blocks else whole, exact=())

    def encode(self, x: Tensor, number: int, site: str, sends: str) -> Tensor:
        """Encodes ``x`` [ranks, numel]: uint8 [ranks, payload_bytes]. ``number`` makes the seeds of several exchanges differ."""
        parts = []
        if self.blocks:
            padded = [F.pad(part, (0, -part.shape[1] % BLOCK)) for part in _cut(x, self.blocks)]
            blocks = torch.cat(padded, 1).unflatten(1, (-1, BLOCK))
            parts.append(dct.quantize_rows(blocks, seed_of(blocks, number), self.bits, site=site, sends=sends))
        for spans, dtype in ((self.rounded, torch.bfloat16), (self.exact, self.dtype)):
            if spans:
                parts.append(torch.cat(_cut(x, spans), 1).to(dtype).view(torch.uint8))
        return torch.cat(parts, 1)

    def decode(self, payload: Tensor, dtype: torch.dtype, site: str, receives: str) -> Tensor:
        """Decodes what :meth:`encode` returns: ``dtype`` [ranks, numel]."""
        found: dict[int, Tensor] = {}
        start = 0
        if self.blocks:
            shape = [sum(-(-numel // BLOCK) for _, numel in self.blocks), BLOCK]
            start = shape[0] * quantized_row_bytes(BLOCK, self.bits)
            codes = payload[:, :start].contiguous()
            values = dct.dequantize_rows(codes, shape, self.bits, dtype, site=site, receives=receives).flatten(1)
            place = 0
            for offset, numel in self.blocks:
                found[offset] = values[:, place : place + numel]
                place += -(-numel // BLOCK) * BLOCK
        for spans, kept in ((self.rounded, torch.bfloat16), (self.exact, self.dtype)):
            if spans:
                end = start + sum(numel for _, numel in spans) * kept.itemsize
                values = payload[:, start:end].clone(memory_format=torch.contiguous_format).view(kept)
                for (offset, _), part in zip(spans, values.split([numel for _, numel in spans], 1), strict=True):
                    found[offset] = part.to(dtype)
                start = end
        return torch.cat([found[offset] for offset in sorted(found)], 1)


@dataclass(frozen=True, kw_only=True)
class QuantizedShards(Offer):
    """An offer of the scheme "quantized_shards"."""

    codec: ShardCodec

    def gather(self, shard: Tensor, comm: Comm) -> Tensor:
        """Gathers the ``shard`` [numel] of every rank: [ranks, numel], as all ranks decode it, this one's own part too."""
        return gathered(self.codec, shard, self.exchange, comm)

    def reduce(self, grad: Tensor, comm: Comm) -> Tensor:
        """Sends each rank its part of ``grad`` [ranks * numel], and adds up what it gets: float32 [numel]. Its own part is exact."""
        rows = grad.view(comm.size, -1)
        return summed(self.codec.of(rows.shape[1]), rows, self.exchange, comm)


def gathered(codec: ShardCodec, shard: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
    """Gathers the ``shard`` [numel] of every rank: [ranks, numel], as all ranks decode it, this one's own part too."""
    payload = codec.encode(shard.unsqueeze(0), exchange.number, exchange.label, ALL_GATHER)
    return codec.decode(comm.wait(comm.all_gather(payload)), shard.dtype, exchange.label, ALL_GATHER)


def summed(codec: ShardCodec, rows: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
    """Sends each rank its row of ``rows`` [ranks, numel], and adds up what it gets: float32 [numel]. Its own row is exact."""
    received = comm.wait(comm.all_to_all(codec.encode(rows, exchange.number, exchange.label, ALL_TO_ALL)))
    parts = codec.decode(received, torch.float32, exchange.label, ALL_TO_ALL)
    # Ranks differ by a constant alone. Inductor orders nodes by the form of a graph, and their collectives must come in one order.
    own = torch.arange(comm.size, device=rows.device).unsqueeze(1) == exchange.rank
    return torch.where(own, rows.float(), parts).sum(0)


def _cut(x: Tensor, spans: tuple[Span, ...]) -> list[Tensor]:
    return [x[:, offset : offset + numel] for offset, numel in spans]


def offer(exchange: Exchange, config: DCTConfig) -> QuantizedShards | Declined | None:
    """Offers blocks of integers, or bfloat16, for the shards of parameters and for their gradients."""
    if exchange.kind not in (PARAMETER, SHARDED_GRADIENT) or not exchange.segments:
        return None  # those of a graph travel as pairs
    assert exchange.dtype is not None
    codec = config.parameter_codec if exchange.kind == PARAMETER else config.sharded_gradients
    if (reason := refused(codec, exchange)) is not None:
        return Declined(reason)
    members = divide(exchange, config, partial(too_short, codec, exchange.dtype.itemsize))
    if isinstance(members, str):
        return Declined(members)
    small, exact = (tuple((part.offset, part.parameter.numel) for part in parts) for parts in (members.compressed, members.rest))
    in_blocks, names = codec in BITS, members.rest_names
    shards = ShardCodec(small if in_blocks else (), () if in_blocks else small, exact, BITS.get(codec, 0), exchange.dtype)
    plain, but = (Reason.BLOCKS, Reason.BLOCKS_BUT) if in_blocks else (Reason.ROUNDED, Reason.ROUNDED_BUT)
    traffic = traffic_of(exchange, shards)
    return QuantizedShards(
        exchange=exchange,
        scheme="quantized_shards",
        reason=(but if names else plain).format(codec=codec, block=BLOCK, names=names),
        too_large=Reason.BLOCKS_TOO_LARGE.format(codec=codec, wire=traffic.wire_bytes, dense=exchange.dense_traffic.wire_bytes),
        traffic=traffic,
        digest=f"{codec}, {shards.payload_bytes} bytes",
        codec=shards,
    )


def refused(codec: str, exchange: Exchange) -> str | None:
    """Returns the reason why the option ``codec`` leaves an exchange dense, if it does."""
    assert exchange.dtype is not None
    if codec == "dense":
        return Reason.PARAMETER_DENSE if exchange.kind == PARAMETER else Reason.SHARDED_DENSE
    if codec == "bfloat16" and exchange.dtype.itemsize == 2:
        return Reason.ALREADY_SMALL.format(dtype=str(exchange.dtype).removeprefix("torch."), codec=codec)
    return None


def too_short(codec: str, itemsize: int, parameter: Parameter) -> str | None:
    """Returns the reason why blocks of a parameter would not be smaller than its values, if so."""
    wire = -(-parameter.numel // BLOCK) * quantized_row_bytes(BLOCK, BITS[codec]) if codec in BITS else 2 * parameter.numel
    return Reason.SHORT_SHARD.format(codec=codec) if wire >= itemsize * parameter.numel else None


def traffic_of(exchange: Exchange, codec: ShardCodec) -> Traffic:
    """Returns the work of one call: a rank encodes its shard, or its gradient for all ranks, and decodes what all ranks send."""
    assert exchange.dtype is not None
    rows = 1 if exchange.kind == PARAMETER else exchange.ranks
    size = codec.numel * exchange.dtype.itemsize
    passes = rows * (2 * size + codec.payload_bytes) + exchange.ranks * (codec.payload_bytes + 2 * size)
    return exchange.sent_encoded(rows * codec.payload_bytes).passing_over(passes)
