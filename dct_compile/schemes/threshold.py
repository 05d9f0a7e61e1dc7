"""Threshold with error feedback [Gupta21], the scheme "gather": the payload of every rank goes to every rank.

::

    mean = all_reduce(grad, "avg")       dct.select_threshold(grad, residual, threshold!)      skips itself on most steps
                                         payload  = dct.threshold_pack(grad, residual!, ...)
                                  ==>    gathered = all_gather_into_tensor(payload)
                                         mean     = dct.unpack_accumulate(gathered, divisor=ranks)

The bytes per rank grow with the number of ranks. ``threshold_owner.py`` has the scheme whose bytes do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from dct_compile.comm import Comm, Steps
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_GATHER, GRADIENT, Exchange, Parameter
from dct_compile.reasons import Reason
from dct_compile.schemes.members import Members, divide, said_too_large
from dct_compile.schemes.offer import Declined, GradientOffer
from dct_compile.schemes.rest import Rider
from dct_compile.schemes.threshold_codec import ThresholdCodec
from dct_compile.state.spec import StateSpec
from dct_compile.traffic import to_all


@dataclass(frozen=True, kw_only=True)
class Gather(GradientOffer):
    """An offer of the scheme "gather". ``rider``: the dense rest behind the payload; ``None`` where it travels beside it, or is empty."""

    codec: ThresholdCodec
    rider: Rider | None

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        if self.rider is not None:
            payload = self.codec.encode(grad, state, sends=ALL_GATHER)
            gathered = yield comm.all_gather(self.rider.attach(payload, self.members.rest_of(grad)))
            payloads, rests = self.rider.detach(gathered)
            return self.codec.decode_sum(payloads, self.rider.mean(rests), grad, self.exchange.divisor, in_place)
        rest = self.members.start_rest(grad, comm, self.exchange)
        payload = self.codec.encode(grad, state, sends=ALL_GATHER)
        started = comm.all_gather(payload)
        rest = yield from self.members.end_rest(rest)
        gathered = yield started
        return self.codec.decode_sum(gathered, rest, grad, self.exchange.divisor, in_place)


def offer(exchange: Exchange, config: DCTConfig) -> Gather | Declined | None:
    """Offers to gather payloads. A module whose parameters may be unused always takes this scheme: only a rank knows what it used."""
    wanted = ("auto", "gather", "owner", "two_level") if exchange.may_be_unused else ("auto", "gather")
    if exchange.kind != GRADIENT or config.gradient_scheme not in wanted:
        return None
    members = divide_by_density(exchange, config)
    if isinstance(members, str):
        return Declined(members)
    codec = ThresholdCodec.of(exchange, members, 1, config)
    payload = codec.layout.payload_bytes
    rider = Rider.of(members, exchange, payload, ALL_GATHER)
    traffic = to_all(payload, exchange.ranks).passing_over(codec.memory_bytes(exchange, payloads=exchange.ranks))
    traffic = traffic + (members.rest_traffic(exchange) if rider is None else rider.traffic(payload))
    return Gather(
        exchange=exchange,
        scheme="gather",
        reason=said("gather", members, config),
        too_large=said_too_large("gather", exchange, traffic),
        traffic=traffic,
        digest=codec.digest,
        members=members,
        state=StateSpec(members.numels, codec.state(), orders=members.orders, densities=members.densities(config)),
        codec=codec,
        rider=rider,
    )


def divide_by_density(exchange: Exchange, config: DCTConfig) -> Members | str:
    """Divides the parameters of ``exchange`` for a scheme that keeps a fraction of the elements; returns the reason where it keeps all."""
    if config.dp_density == 1 and not config.parameter_densities:
        return str(Reason.DP_DENSITY_ONE)
    return divide(exchange, config, partial(_kept_whole, config))


def _kept_whole(config: DCTConfig, parameter: Parameter) -> str | None:
    if config.density_of(parameter.name) < 1:
        return None
    return str(Reason.DP_DENSITY_ONE if config.dp_density == 1 else Reason.OWN_DENSITY_ONE)


def said(scheme: str, members: Members, config: DCTConfig) -> str:
    """Returns the report's words for an offer that keeps a fraction of the elements."""
    template = Reason.GRADIENT_BUT if members.rest else Reason.GRADIENT
    densities = members.densities(config)
    shown = " to ".join(f"{density:g}" for density in sorted({min(densities), max(densities)}))
    return template.format(scheme=scheme, density=shown, names=members.rest_names)
