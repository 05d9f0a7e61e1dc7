"""Threshold with error feedback at two levels, the scheme "two_level": a host adds up dense, and hosts exchange payloads.

::

    mean = all_reduce(grad, "avg")       sum      = reduce_scatter(grad + residual)          inside a host: a part of each parameter
                                         dct.select_threshold(sum, threshold!)
                                  ==>    payload  = dct.threshold_pack(sum, residual!, ...)
                                         gathered = all_gather_into_tensor(payload)          across hosts: ranks with the same part
                                         part     = dct.unpack_accumulate(gathered, divisor=ranks)
                                         mean     = all_gather_into_tensor(part)             inside a host

A host sends what one rank would send under "gather", however many ranks it has. What a rank does not send are elements of its own part. Its
residual has the size of the whole parameter, zero elsewhere: then the sum over the ranks is what waits, as in every scheme.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm, HostsComm
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_GATHER, GRADIENT, Exchange, Parameter, segments_of
from dct_compile.reasons import Reason
from dct_compile.schemes.members import Members, said_too_large
from dct_compile.schemes.offer import Declined, GradientOffer
from dct_compile.schemes.threshold import divide_by_density, said
from dct_compile.schemes.threshold_codec import ThresholdCodec
from dct_compile.state.spec import StateSpec, end_to_end, residual_of
from dct_compile.traffic import to_all


@dataclass(frozen=True, kw_only=True)
class TwoLevel(GradientOffer):
    """An offer of the scheme "two_level". ``codec``: works on this rank's parts of the parameters, end to end."""

    codec: ThresholdCodec

    def reduce(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm) -> Tensor:
        assert isinstance(comm, HostsComm)
        inside, place = comm.inside, self.exchange.rank % comm.inside.size
        rest = self.members.start_rest(grad, comm, self.exchange)
        waiting = self._rows(state["residual"].split(list(self.members.numels)), inside.size)
        # The codec adds what waits of the own part. Another scheme may have left more, which goes to the rank whose part it is of.
        others = torch.cat([waiting[:place], torch.zeros_like(waiting[place : place + 1]), waiting[place + 1 :]])
        rows = self._rows(self.members.split(grad), inside.size) + others
        total = inside.wait(inside.reduce_scatter(rows)).view(-1)
        own = waiting[place].clone()
        payload = self.codec.encode(total, {**state, "residual": own}, sends=ALL_GATHER)
        gathered = comm.across.wait(comm.across.all_gather(payload))
        mean = self.codec.decode_sum(gathered, None, total, self.exchange.divisor).to(grad.dtype)
        left = F.pad(own, (place * own.numel(), (inside.size - 1 - place) * own.numel()))
        torch.ops.dct.store(state["residual"], torch.cat(self._whole(left)))
        means = self._whole(inside.wait(inside.all_gather(mean)))
        return self.members.join(means, self.members.end_rest(rest, comm))

    @staticmethod
    def _rows(parts: Sequence[Tensor], ranks: int) -> Tensor:
        """Cuts each parameter [numel] into a part for each rank of a host, padded with zeros: [ranks, ...], end to end."""
        return torch.cat([F.pad(part, (0, -part.numel() % ranks)).view(ranks, -1) for part in parts], 1)

    def _whole(self, rows: Tensor) -> list[Tensor]:
        """Returns the parameters that the parts of all ranks of a host make up. ``rows``: the parts, rank by rank, end to end."""
        sizes = [numel for _, numel in self.codec.layout.segments]
        columns = rows.view(-1, sum(sizes)).split(sizes, 1)
        return [column.reshape(-1)[:numel] for column, numel in zip(columns, self.members.numels, strict=True)]


def offer(exchange: Exchange, config: DCTConfig) -> TwoLevel | Declined | None:
    """Offers to add up inside hosts, and to gather payloads across them."""
    if exchange.kind != GRADIENT or exchange.may_be_unused or config.gradient_scheme not in ("auto", "two_level"):
        return None
    hosts = exchange.ranks // exchange.per_host
    if exchange.per_host == 1 or hosts == 1:
        return Declined(Reason.NO_HOSTS) if config.gradient_scheme == "two_level" else None
    members = divide_by_density(exchange, config)
    if isinstance(members, str):
        return Declined(members)
    counted = tuple(-(-numel // exchange.per_host) for numel in members.numels)
    named = zip(members.compressed, counted, strict=True)
    parts = segments_of([Parameter(segment.parameter.position, segment.parameter.name, (numel,)) for segment, numel in named])
    codec = ThresholdCodec.of(exchange, Members(sum(counted), parts, ()), 1, config)
    _, threshold, counters = codec.state()
    residual = residual_of(end_to_end(members.numels))
    whole = 4 * sum(members.numels)
    # Inside a host a message passes through memory. The gradient goes to the sum, and the mean comes back.
    memory = codec.memory_bytes(exchange, payloads=hosts) + 4 * whole + 4 * whole * (exchange.per_host - 1) // exchange.per_host
    traffic = to_all(codec.layout.payload_bytes, hosts).passing_over(memory) + members.rest_traffic(exchange)
    return TwoLevel(
        exchange=exchange,
        scheme="two_level",
        reason=Reason.TWO_LEVEL.format(reason=said("two_level", members, config), ranks=exchange.per_host),
        too_large=said_too_large("two_level", exchange, traffic),
        traffic=traffic,
        digest=f"{codec.digest}, {exchange.per_host} ranks of a host",
        members=members,
        state=StateSpec(members.numels, (residual, threshold, counters), densities=members.densities(config), counted=counted),
        codec=codec,
    )
