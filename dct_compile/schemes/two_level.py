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
from dct_compile.schemes.rest import Rider
from dct_compile.schemes.threshold import divide_by_density, said
from dct_compile.schemes.threshold_codec import ThresholdCodec
from dct_compile.state.spec import StateSpec, end_to_end, residual_of
from dct_compile.traffic import INSIDE_PASSES, NOTHING, ring_twice, to_all

TWO_LEVEL = "two_level"
"""The name of the scheme."""


@dataclass(frozen=True, kw_only=True)
class TwoLevel(GradientOffer):
    """An offer of the scheme "two_level". ``codec``: works on this rank's parts of the compressed parameters, end to end.

    ``rider``: carries this rank's part of the dense rest across hosts; ``None`` where it travels beside the payload, or is empty.
    """

    codec: ThresholdCodec
    rider: Rider | None

    def reduce(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm) -> Tensor:
        assert isinstance(comm, HostsComm)
        inside, place = comm.inside, self.exchange.rank % comm.inside.size
        waiting = _parts(state["residual"].split(list(self.members.numels)), inside.size)
        own = waiting[place].clone()
        # The codec adds what waits of the own part. Another scheme may have left more, which goes to the rank whose part it is of.
        waiting[place].zero_()
        rest = [self.members.rest_of(grad)] if self.members.rest else []
        rows = _parts([*self.members.split(grad), *rest], inside.size).float()
        rows[:, : own.numel()] += waiting
        total = inside.wait(inside.reduce_scatter(rows)).view(-1)
        mean = self._across(total[: own.numel()], total[own.numel() :], {**state, "residual": own}, comm.across)
        left = F.pad(own, (place * own.numel(), (inside.size - 1 - place) * own.numel())).view(inside.size, -1)
        torch.ops.dct.store(state["residual"], torch.cat(_whole(left, self.members.numels)))
        means = inside.wait(inside.all_gather(mean.to(grad.dtype))).view(inside.size, -1)
        *compressed, mean_rest = _whole(means, (*self.members.numels, self.members.rest_numel))
        return self.members.join(compressed, mean_rest if rest else None)

    def _across(self, total: Tensor, rest: Tensor, state: Mapping[str, Tensor], across: Comm) -> Tensor:
        """Averages this rank's part of the sum, and that of the rest, which follows it in the result, over the hosts."""
        divisor, payload = self.exchange.divisor, self.codec.encode(total, state, sends=ALL_GATHER)
        if self.rider is not None:
            payloads, rests = self.rider.detach(across.wait(across.all_gather(self.rider.attach(payload, rest))))
            return torch.cat([self.codec.decode_sum(payloads, None, total, divisor), self.rider.mean(rests)])
        beside = across.all_reduce(rest) if self.members.rest else None
        mean = self.codec.decode_sum(across.wait(across.all_gather(payload)), None, total, divisor)
        return mean if beside is None else torch.cat([mean, across.wait(beside) / divisor])


def _parts(tensors: Sequence[Tensor], ranks: int) -> Tensor:
    """Cuts each tensor [numel] into a part for each rank, the last ones padded with zeros: [ranks, ...], end to end."""
    return torch.cat([F.pad(tensor, (0, -tensor.numel() % ranks)).view(ranks, -1) for tensor in tensors], 1)


def _whole(parts: Tensor, numels: Sequence[int]) -> list[Tensor]:
    """Returns the tensors of ``numels`` elements that :func:`_parts` has cut."""
    columns = parts.split([-(-numel // len(parts)) for numel in numels], 1)
    return [column.reshape(-1)[:numel] for column, numel in zip(columns, numels, strict=True)]


def offer(exchange: Exchange, config: DCTConfig) -> TwoLevel | Declined | None:
    """Offers to add up inside hosts, and to gather payloads across them."""
    if exchange.kind != GRADIENT or exchange.may_be_unused or config.gradient_scheme not in ("auto", TWO_LEVEL):
        return None
    ranks, hosts = exchange.per_host, exchange.ranks // exchange.per_host
    if ranks == 1 or hosts == 1:
        return Declined(Reason.NO_HOSTS) if config.gradient_scheme == TWO_LEVEL else None
    members = divide_by_density(exchange, config)
    if isinstance(members, str):
        return Declined(members)
    counted = tuple(-(-numel // ranks) for numel in members.numels)
    named = zip(members.compressed, counted, strict=True)
    parts = segments_of([Parameter(segment.parameter.position, segment.parameter.name, (numel,)) for segment, numel in named])
    codec = ThresholdCodec.of(exchange, Members(sum(counted), parts, ()), 1, config)
    _, threshold, counters = codec.state()
    payload_bytes, rest_numel = codec.layout.payload_bytes, -(-members.rest_numel // ranks)
    alone = ring_twice(4 * rest_numel, hosts) if members.rest else NOTHING
    rider = Rider(rest_numel, torch.float32, hosts, exchange.divisor, 1).if_it_pays(payload_bytes, alone)
    # The gradient goes to the sum inside of the host, and the mean comes back; the parts are copied on both ways.
    whole = 4 * sum((*members.numels, members.rest_numel))
    inside = 2 * INSIDE_PASSES * whole * (ranks - 1) // ranks + 4 * whole
    traffic = to_all(payload_bytes, hosts).passing_over(codec.memory_bytes(exchange, payloads=hosts) + inside)
    traffic = traffic + (rider.traffic(payload_bytes) if rider is not None else alone)
    return TwoLevel(
        exchange=exchange,
        scheme=TWO_LEVEL,
        reason=Reason.TWO_LEVEL.format(reason=said(TWO_LEVEL, members, config), ranks=ranks),
        too_large=said_too_large(TWO_LEVEL, exchange, traffic),
        traffic=traffic,
        digest=f"{codec.digest}, {ranks} ranks of a host",
        members=members,
        state=StateSpec(
            members.numels,
            (residual_of(end_to_end(members.numels)), threshold, counters),
            densities=members.densities(config),
            counted=counted,
        ),
        codec=codec,
        rider=rider,
    )
