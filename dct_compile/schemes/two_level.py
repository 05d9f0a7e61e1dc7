"""Threshold with error feedback at two levels, the scheme "two_level": a host adds up dense, and hosts exchange payloads.

::

    mean = all_reduce(grad, "avg")       sum      = all_to_all_single(grad).sum()            inside a host: a part of each parameter
                                         dct.select_threshold(sum, threshold!)
                                  ==>    payload  = dct.threshold_pack(sum, residual!, ...)
                                         gathered = all_gather_into_tensor(payload)          across hosts: ranks with the same part
                                         gathered = all_gather_into_tensor(gathered)         inside a host: the payloads of all parts
                                         mean     = dct.unpack_accumulate(gathered, divisor=ranks)

A host sends what one rank would send under "gather", however many ranks it has. What a rank does not send are elements of its own part. Its
residual has the size of the whole parameter, zero elsewhere: then the sum over the ranks is what waits, as in every scheme.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm, HostsComm, Steps
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_GATHER, GRADIENT, Exchange, Parameter, segments_of
from dct_compile.reasons import Reason
from dct_compile.schemes.members import Members, said_too_large
from dct_compile.schemes.offer import Declined, GradientOffer
from dct_compile.schemes.rest import Rider
from dct_compile.schemes.threshold import divide_by_density, said
from dct_compile.schemes.threshold_codec import ThresholdCodec
from dct_compile.state.spec import StateSpec, end_to_end, residual_of
from dct_compile.traffic import NOTHING, ring_twice, to_all

TWO_LEVEL = "two_level"
"""The name of the scheme."""


@dataclass(frozen=True, kw_only=True)
class TwoLevel(GradientOffer):
    """An offer of the scheme "two_level". ``codec``: works on this rank's parts of the compressed parameters, end to end.

    ``rider``: carries this rank's part of the dense rest across hosts; ``None`` where it travels beside the payload, or is empty.
    """

    codec: ThresholdCodec
    rider: Rider | None

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        assert isinstance(comm, HostsComm)
        inside, place = comm.inside, self.exchange.rank % comm.inside.size
        residuals = state["residual"].data.split(list(self.members.numels))
        waiting = [_parts(residual, inside.size) for residual in residuals]
        own = torch.cat([parts[place] for parts in waiting])
        rows = yield inside.all_to_all(self._rows(grad, waiting, place))
        total = rows.view(inside.size, -1).sum(0)
        means, rests = yield from self._across(total, {**state, "residual": own}, grad, comm)
        # In place and by no operator: DDP runs it, not a graph that keeps the residual for its backward.
        state["residual"].data.zero_()
        for residual, left in zip(residuals, own.split(_columns(self.members.numels, inside.size)), strict=True):
            run = residual[place * left.numel() : (place + 1) * left.numel()]
            run.copy_(left[: run.numel()])
        (rest,) = _whole(rests, [self.members.rest_numel]) if rests else [None]
        return self.members.join(_whole(means, self.members.numels), rest, grad if in_place else None)

    def _rows(self, grad: Tensor, waiting: Sequence[Tensor], place: int) -> Tensor:
        """Returns what goes to each rank of the host, float32 and end to end: its part of every parameter, and of the rest.

        What is ``waiting`` for the part of another rank goes with it: another scheme may have left that. The codec adds its own part of it.
        """
        ranks = len(waiting[0])
        parts = [_parts(tensor, ranks) for tensor in self.members.split(grad)]
        rest = [_parts(self.members.rest_of(grad), ranks)] if self.members.rest else []
        rows = torch.cat([*parts, *rest], 1).float()
        columns = rows.split([part.shape[1] for part in (*parts, *rest)], 1)
        for column, left in zip(columns, waiting, strict=not rest):
            for others in (slice(place), slice(place + 1, ranks)):
                column[others] += left[others]
        return rows.view(-1)

    def _across(
        self, total: Tensor, state: Mapping[str, Tensor], grad: Tensor, comm: HostsComm
    ) -> Generator[Tensor, Tensor, tuple[list[Tensor], list[Tensor]]]:
        """Averages this rank's part of the sum over the hosts, with that of the rest, which follows it.

        Returns the means of the parts of all ranks of this host, and those of the rest.
        """
        inside, across, own, divisor = comm.inside, comm.across, state["residual"].numel(), self.exchange.divisor
        part, rest = total[:own], total[own:]
        payload = self.codec.encode(part, state, sends=ALL_GATHER)
        beside = across.all_reduce(rest) if self.members.rest and self.rider is None else None
        sent = payload if self.rider is None else self.rider.attach(payload, rest)
        # The payloads of all parts are far fewer bytes than the means, so every rank of the host decodes them.
        of_hosts = yield across.all_gather(sent)
        of_ranks = yield inside.all_gather(of_hosts)
        gathered = of_ranks.view(inside.size, -1).unbind()
        rests: list[Tensor] = []
        if self.rider is not None:
            gathered, ridden = zip(*map(self.rider.detach, gathered), strict=True)
            rests = [self.rider.mean(addends).to(grad.dtype) for addends in ridden]
        elif beside is not None:
            summed = yield beside
            whole = yield inside.all_gather((summed / divisor).to(grad.dtype))
            rests = list(whole.view(inside.size, -1).unbind())
        return [self.codec.decode_sum(payloads, None, grad[:own], divisor) for payloads in gathered], rests


def _columns(numels: Sequence[int], ranks: int) -> list[int]:
    """Returns the elements of each parameter's part."""
    return [-(-numel // ranks) for numel in numels]


def _parts(tensor: Tensor, ranks: int) -> Tensor:
    """Cuts ``tensor`` [numel] into a part for each rank, the last ones padded with zeros: [ranks, columns]."""
    padding = -tensor.numel() % ranks
    return (F.pad(tensor, (0, padding)) if padding else tensor).view(ranks, -1)


def _whole(parts: Sequence[Tensor], numels: Sequence[int]) -> list[Tensor]:
    """Returns the tensors of ``numels`` elements from each rank's parts of them, end to end."""
    columns = zip(*(part.split(_columns(numels, len(parts))) for part in parts), strict=True)
    return [torch.cat(column)[:numel] for column, numel in zip(columns, numels, strict=True)]


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
    counted = tuple(_columns(members.numels, ranks))
    named = zip(members.compressed, counted, strict=True)
    parts = segments_of([Parameter(segment.parameter.position, segment.parameter.name, (numel,)) for segment, numel in named])
    codec = ThresholdCodec.of(exchange, Members(sum(counted), parts, ()), 1, config)
    _, threshold, counters = codec.state()
    payload_bytes, rest_numel = codec.layout.payload_bytes, -(-members.rest_numel // ranks)
    alone = ring_twice(4 * rest_numel, hosts) if members.rest else NOTHING
    rider = Rider(rest_numel, torch.float32, hosts, exchange.divisor, 1).if_it_pays(payload_bytes, alone)
    traffic = to_all(payload_bytes, hosts) + (rider.traffic(payload_bytes) if rider is not None else alone)
    whole, of_all = 4 * sum((*members.numels, members.rest_numel)), ranks * hosts * (payload_bytes + 4 * rest_numel)
    # The rows are added up with what waits, sent, and added up again; the residual is written, and the means are joined twice.
    traffic = traffic.passing_over(codec.memory_bytes(exchange, payloads=hosts) + 10 * whole + 2 * of_all)
    traffic = traffic.inside_a_host((whole + of_all) * (ranks - 1) // ranks)
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
