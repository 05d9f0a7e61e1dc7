"""Quantised shards inside of a graph (SimpleFSDP): the all_gather of a parameter, and the reduce_scatter of its gradient as its backward.

The codes are those of ``quantized_shards.py``. What it does for all parameters of a group, this one does for one parameter.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import PARAMETER, Exchange, Parameter
from dct_compile.reasons import Reason
from dct_compile.schemes.codecs import BITS
from dct_compile.schemes.offer import Declined, RowOffer
from dct_compile.schemes.quantized_shards import BLOCK, ShardCodec, gathered, refused, summed, too_short, traffic_of


@dataclass(frozen=True, kw_only=True)
class GatheredShards(RowOffer):
    """An offer of the scheme "gathered_shards". ``gradients``: the codec of the backward."""

    codec: ShardCodec
    gradients: ShardCodec

    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        return gathered(self.codec, x.reshape(-1), self.exchange, comm).reshape(-1, *x.shape[1:]), ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        exchange = self.exchange.backward
        assert exchange is not None
        total = summed(self.gradients, dy.reshape(comm.size, -1), exchange, comm) / exchange.divisor
        return total.to(dy.dtype).reshape(-1, *dy.shape[1:])


def offer(exchange: Exchange, config: DCTConfig) -> GatheredShards | Declined | None:
    """Offers blocks of integers, or bfloat16, for a parameter that a graph gathers, and for the gradient that it reduces."""
    if exchange.kind != PARAMETER or exchange.segments:
        return None
    assert exchange.shape is not None
    assert exchange.dtype is not None
    if exchange.uneven:
        return Declined(Reason.UNEVEN)
    numel = prod(exchange.shape)
    shard = Parameter(0, exchange.name, exchange.shape)
    if (reason := refused(config.parameter_codec, exchange)) is not None:
        return Declined(reason)
    if numel < config.min_numel:
        return Declined(Reason.MIN_NUMEL.format(min_numel=config.min_numel))
    if (reason := too_short(config.parameter_codec, exchange.dtype.itemsize, shard)) is not None:
        return Declined(reason)
    codec, back = _codec(config.parameter_codec, numel, exchange), exchange.backward
    gradients = _codec(config.sharded_gradients, numel, exchange if back is None else back)
    traffic = traffic_of(exchange, codec)
    return GatheredShards(
        exchange=exchange,
        scheme="gathered_shards",
        reason=_said(config.parameter_codec),
        too_large=Reason.BLOCKS_TOO_LARGE.format(
            codec=config.parameter_codec, wire=traffic.wire_bytes, dense=exchange.dense_traffic.wire_bytes
        ),
        traffic=traffic,
        digest=f"{config.parameter_codec}, {config.sharded_gradients}, {codec.payload_bytes} and {gradients.payload_bytes} bytes",
        backward_traffic=traffic_of(back, gradients) if back is not None else None,
        backward_reason=_said(config.sharded_gradients),
        codec=codec,
        gradients=gradients,
    )


def _codec(name: str, numel: int, exchange: Exchange) -> ShardCodec:
    assert exchange.dtype is not None
    whole = ((0, numel),)
    empty: tuple[tuple[int, int], ...] = ()
    blocks, rounded, exact = (whole if chosen else empty for chosen in (name in BITS, name == "bfloat16", name == "dense"))
    return ShardCodec(blocks, rounded, exact, BITS.get(name, 0), exchange.dtype)


def _said(codec: str) -> str:
    """Returns the report's words for a codec."""
    if codec == "dense":
        return Reason.SHARDED_DENSE
    return Reason.BLOCKS.format(codec=codec, block=BLOCK) if codec in BITS else Reason.ROUNDED
