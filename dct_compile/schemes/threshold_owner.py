"""Threshold with error feedback, the scheme "owner": each rank owns a share of every parameter and sums it for all.

::

    mean = all_reduce(grad, "avg")       dct.select_threshold(grad, residual, threshold!)
                                         payload  = dct.threshold_pack(grad, residual!, ...)          one chunk for each owner
                                  ==>    chunks   = all_to_all_single(payload)
                                         chunk    = dct.repack(chunks, owner_residual!, ...)          summed, and thresholded again
                                         gathered = all_gather_into_tensor(chunk)
                                         mean     = dct.unpack_accumulate(gathered, divisor=ranks)

The bytes per rank do not grow with the number of ranks. It is the parameter server of [Gupta21], cut into shares.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dct_compile.comm import Comm, Steps
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_TO_ALL, GRADIENT, Exchange
from dct_compile.schemes.members import said_too_large
from dct_compile.schemes.offer import Declined, GradientOffer
from dct_compile.schemes.rest import Rider
from dct_compile.schemes.threshold import divide_by_density, said
from dct_compile.schemes.threshold_codec import ThresholdCodec
from dct_compile.state.spec import StateSpec
from dct_compile.traffic import one_share_to_each, to_all
from dct_compile.triton_kernels.shares import UNIT


@dataclass(frozen=True, kw_only=True)
class Owner(GradientOffer):
    """An offer of the scheme "owner"; ``owner_codec`` works on the share that this rank owns. ``rider``: as in "gather"."""

    codec: ThresholdCodec
    owner_codec: ThresholdCodec
    rider: Rider | None

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        if self.rider is not None:
            return (yield from self._with_rider(grad, state, comm, self.rider, in_place))
        rest = self.members.start_rest(grad, comm, self.exchange)
        payload = self.codec.encode(grad, state, sends=ALL_TO_ALL)
        chunks = yield comm.all_to_all(payload)
        started = comm.all_gather(self.owner_codec.encode_sum(chunks, state))
        rest = yield from self.members.end_rest(rest)
        gathered = yield started
        return self.codec.decode_sum(gathered, rest, grad, self.exchange.divisor, in_place)

    def _with_rider(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, rider: Rider, in_place: bool) -> Steps:
        """Reduces like :meth:`steps`, with a share of the rest behind each chunk."""
        payload = self.codec.encode(grad, state, sends=ALL_TO_ALL)
        exchanged = yield comm.all_to_all(rider.attach(payload, self.members.rest_of(grad), comm.size))
        chunks, shares = rider.detach(exchanged)
        chunk = self.owner_codec.encode_sum(chunks, state)
        gathered = yield comm.all_gather(rider.attach(chunk, rider.mean(shares)))
        chunks, means = rider.detach(gathered)
        return self.codec.decode_sum(chunks, means.view(-1)[: rider.numel], grad, self.exchange.divisor, in_place)


def offer(exchange: Exchange, config: DCTConfig) -> Owner | Declined | None:
    """Offers to send payloads through the owners of shares."""
    if exchange.kind != GRADIENT or exchange.may_be_unused or config.gradient_scheme not in ("auto", "owner"):
        return None
    members = divide_by_density(exchange, config)
    if isinstance(members, str):
        return Declined(members)
    codec = ThresholdCodec.of(exchange, members, exchange.ranks, config)
    owner_codec = replace(codec, layout=replace(codec.layout, chunk=exchange.rank), stage="owner")
    sent = one_share_to_each(codec.layout.payload_bytes, exchange.ranks) + to_all(codec.layout.chunk_bytes, exchange.ranks)
    memory = codec.memory_bytes(exchange, payloads=1) + 12 * owner_codec.layout.state_numel
    rider = Rider.of(members, exchange, codec.layout.payload_bytes, ALL_TO_ALL)
    beside = members.rest_traffic(exchange) if rider is None else rider.traffic(codec.layout.chunk_bytes)
    traffic = sent.passing_over(memory) + beside
    return Owner(
        exchange=exchange,
        scheme="owner",
        reason=said("owner", members, config),
        too_large=said_too_large("owner", exchange, traffic),
        traffic=traffic,
        digest=codec.digest,
        members=members,
        state=StateSpec(
            members.numels,
            codec.state() + owner_codec.state(),
            (codec.layout.block, codec.layout.chunks, owner_codec.layout.chunk, UNIT),
            orders=members.orders,
            densities=members.densities(config),
        ),
        codec=codec,
        owner_codec=owner_codec,
        rider=rider,
    )
