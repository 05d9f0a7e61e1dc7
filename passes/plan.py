"""Decides about every exchange: takes the cheapest offer of a scheme, or leaves the exchange dense for a reason. Changes no graph.

The cheapest is the one that takes the fewest seconds on the link of the group, the dense collective included. Where no link is known, it is
the one that sends the fewest bytes.

A decision depends on the options, on dtypes, on static sizes and on the link, which the ranks of a group have agreed on. It never depends
on a batch size, which may differ between ranks. All ranks therefore decide alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from dct_compile.config import DCTConfig
from dct_compile.exchange import (
    ALL_REDUCE,
    BACKWARD_OF,
    COMPRESSIBLE,
    COUNTED,
    FILLED,
    FOREIGN,
    GRADIENT,
    OTHER,
    PARAMETER,
    RETURNED,
    STORED,
    Exchange,
    segments_of,
)
from dct_compile.link import ONE_MACHINE, Link, duration
from dct_compile.passes.collectives import DEVICE_COPY
from dct_compile.passes.decision import Decision, dense
from dct_compile.passes.exchanges import exchanges_of
from dct_compile.passes.sites import Site
from dct_compile.reasons import Reason
from dct_compile.schemes import SCHEMES, Declined, GradientOffer, Offer, RowOffer, Scheme
from dct_compile.schemes.late import Late
from dct_compile.schemes.observed import Observed
from dct_compile.traffic import Traffic

LinkOf = Callable[[str], Link | None]
"""Returns the link between the ranks of a group, by the group's name; ``None`` where bytes decide."""

_EXACT = {FILLED: Reason.FILLED, COUNTED: Reason.COUNTED}
"""Why rows of these origins stay as they are."""
_NEAR = Fraction(5, 4)
"""Seconds whose ratio is at most this are taken for equal, because they are predicted. Of such offers the one that sends the fewest bytes
is taken, and before all of them the dense collective, which is exact."""


def unknown_link(_: str) -> Link | None:
    """Returns ``None``: the bytes decide."""
    return None


def plan(sites: Sequence[Site], config: DCTConfig, training: bool, link_of: LinkOf = unknown_link) -> list[Decision]:
    """Decides about all sites of one graph.

    Args:
        sites: The sites, in graph order.
        config: The options.
        training: True if the graph has a backward.
        link_of: The links of the groups. It is called for groups for which schemes have made offers, in the order of the sites.

    Returns:
        One decision per site, in the same order.
    """
    exchanges = exchanges_of(sites, training)
    taken: dict[int, Decision] = {}
    for site, exchange in zip(sites, exchanges, strict=True):
        if site.twin is not None and exchange.kind != GRADIENT:
            decision = follow_forward(exchange, taken[id(site.twin)])
        else:
            decision = decide_in_graph(exchange, config, link_of)
        taken[id(site)] = replace(decision, site=site)
    return [taken[id(site)] for site in sites]


def decide(exchange: Exchange, config: DCTConfig, link_of: LinkOf = unknown_link) -> Decision:
    """Decides about an exchange that is not the backward of another one.

    Args:
        exchange: The exchange, with its backward if it has one.
        config: The options.
        link_of: The links of the groups.

    Returns:
        The decision, without a site.
    """
    reason = _unsupported(exchange) or _left_alone(exchange, config)
    if reason is not None:
        return dense(exchange, reason)
    asked = [(scheme, scheme.ask(exchange.canonical(), config)) for scheme in SCHEMES]
    offers = [(scheme, made) for scheme, made in asked if isinstance(made, Offer)]
    declined = [made.reason for _, made in asked if isinstance(made, Declined)]
    if not offers:
        return dense(exchange, declined[0] if declined else Reason.NO_SCHEME)
    link = link_of(exchange.group)
    # Chosen by one row, which all ranks see alike; taken for the rows that there are.
    least = min(_cost(made.traffic, link) for _, made in offers)
    near = [pair for pair in offers if _cost(pair[1].traffic, link) <= _NEAR * least]
    # Where a link is known, bytes inside of a host count as well: a scheme that only moves them there must be faster by more than that.
    scheme, cheapest = min(near, key=lambda pair: pair[1].traffic.wire + (pair[1].traffic.inside_bytes if link is not None else 0))
    actual = {other.name: _offer_of(other, exchange, config) for other, _ in offers}
    offer, sizes = actual[scheme.name], {name: made.traffic.wire_bytes for name, made in actual.items()}
    if cheapest.traffic.wire >= cheapest.exchange.dense_traffic.wire:
        return replace(dense(exchange, offer.too_large), offers=sizes)
    if link is not None and not _saves_enough(cheapest, link):
        return replace(dense(exchange, _too_slow(offer, link)), offers=sizes, link=link)
    choice = sizes if len(sizes) > 1 else {}
    decision = Decision(exchange, offer, offer.reason, exchange.dense_traffic.wire_bytes, offer.traffic.wire_bytes, choice)
    return replace(decision, traffic=offer.traffic, link=link)


def decide_in_graph(exchange: Exchange, config: DCTConfig, link_of: LinkOf = unknown_link) -> Decision:
    """Decides like :func:`decide` about an exchange that a graph makes; with option ``audit`` the graph notes its gradients, too."""
    decision = decide(exchange, config, link_of)
    offer, reason = decision.offer, decision.reason
    if not isinstance(offer, GradientOffer):
        return decision
    if config.arrival == "late":
        reason = Reason.NOW_IN_GRAPH.format(reason=reason)
    return replace(decision, offer=Observed.of(offer) if config.audit else offer, reason=reason)


def decide_outside(exchange: Exchange, config: DCTConfig, link_of: LinkOf = unknown_link) -> Decision:
    """Decides like :func:`decide` about a gradient that travels outside of graphs; with option ``arrival`` its mean arrives late."""
    decision = decide(exchange, config, link_of)
    if config.arrival == "now" or not isinstance(decision.offer, GradientOffer):
        return decision
    if exchange.may_be_unused:
        return replace(decision, reason=Reason.NOW_UNUSED.format(reason=decision.reason))
    scheme = next(scheme for scheme in SCHEMES if scheme.name == decision.scheme)
    inner = _offer_of(scheme, _of_compressed(exchange, decision.offer), config)
    assert isinstance(inner, GradientOffer)
    offer = Late.of(decision.offer, inner)
    reason, traffic = Reason.LATE.format(reason=decision.reason), offer.traffic
    return replace(decision, offer=offer, reason=reason, wire_bytes=traffic.wire_bytes, traffic=traffic)


def _of_compressed(exchange: Exchange, offer: GradientOffer) -> Exchange:
    """Describes the exchange of those parameters alone that ``offer`` compresses, end to end."""
    assert exchange.dtype is not None
    segments = segments_of([segment.parameter for segment in offer.members.compressed])
    numel = sum(segment.parameter.numel for segment in segments)
    return replace(exchange, segments=segments, shape=(numel,), input_bytes=numel * exchange.dtype.itemsize)


def matching_rows(decisions: Sequence[Decision], config: DCTConfig) -> set[str]:
    """Returns the patterns of the options that match an activation or embedding, also where an earlier pattern or reason counts."""
    exchanges = [decision.exchange for decision in decisions if decision.exchange.kind in BACKWARD_OF]
    return {pattern for pattern in (*config.exempt, *config.codec_patterns) if any(exchange.matches(pattern) for exchange in exchanges)}


def _cost(traffic: Traffic, link: Link | None) -> float | Fraction:
    """Returns the number that is to be least: seconds on ``link``, bytes on the wire where no link is known."""
    return traffic.wire if link is None else traffic.seconds(link)


def _saves_enough(offer: Offer, link: Link) -> bool:
    """Returns True if an offer is clearly faster than the dense collective on ``link``."""
    sent, plain = offer.traffic, offer.exchange.dense_traffic
    if isinstance(offer, RowOffer):
        if sent.seconds(link) >= plain.seconds(link):
            return False
        # One row stands for many here, whose messages take as long to start as that of one.
        sent, plain = sent.riding(), plain.riding()
    return plain.seconds(link) > _NEAR * sent.seconds(link)


def _too_slow(offer: Offer, link: Link) -> str:
    """Returns the report's words for an offer that is not clearly faster than the dense collective."""
    if link == ONE_MACHINE:
        return Reason.ONE_MACHINE
    seconds, dense_seconds = (duration(traffic.seconds(link)) for traffic in (offer.traffic, offer.exchange.dense_traffic))
    return Reason.FAST_LINK.format(scheme=offer.scheme, seconds=seconds, dense=dense_seconds, link=link)


def _offer_of(scheme: Scheme, exchange: Exchange, config: DCTConfig) -> Offer:
    made = scheme.ask(exchange, config)
    assert isinstance(made, Offer), f"{scheme.name} offers for one row and declines for {exchange.shape}"
    return made


def _unsupported(exchange: Exchange) -> str | None:
    """Returns the reason why no scheme can carry this collective, if there is one."""
    if exchange.ranks == 1:
        return Reason.ONE_RANK
    if exchange.operator:
        return Reason.SUBGRAPH.format(operator=exchange.operator)
    if not exchange.collective.carrier:
        return Reason.COLLECTIVE.format(collective=exchange.collective.name)
    if not exchange.waited:
        return Reason.NOT_WAITED
    if not exchange.used:
        return Reason.NEVER_WAITED
    if exchange.shape is None:
        return Reason.UNKNOWN_SHAPE
    if exchange.dtype not in COMPRESSIBLE:
        return Reason.DTYPE.format(dtype=_name(exchange))
    if exchange.collective.sums and exchange.reduce_op not in ("sum", "avg"):
        return Reason.REDUCE_OP.format(op=exchange.reduce_op)
    return None


def _left_alone(exchange: Exchange, config: DCTConfig) -> str | None:
    """Returns the reason why the kind of the exchange leaves it dense, whatever the schemes could do."""
    if exchange.kind == GRADIENT:
        if exchange.collective.name != ALL_REDUCE:
            return Reason.GRADIENT_COLLECTIVE.format(collective=exchange.collective.name)
        return Reason.WHOSE_GRADIENT if not exchange.segments else None
    if exchange.segments:
        return None  # shards outside of graphs: what is exempt is so by parameter
    if exchange.kind in BACKWARD_OF.values() and exchange.origin == FOREIGN:
        return Reason.NO_FORWARD
    if exchange.kind == OTHER:
        return Reason.PARAMETERS
    if exchange.collective is DEVICE_COPY and config.link == "auto":
        return Reason.FAST_COPY
    for pattern in config.exempt:
        if exchange.matches(pattern):
            return Reason.EXEMPT.format(pattern=pattern)
    if exchange.kind == PARAMETER:
        return _mismatch(exchange, exchange.backward) if exchange.backward is not None else None
    if exchange.destination == STORED:
        return Reason.STORED
    if exchange.destination == RETURNED and not config.mp_outputs:
        return Reason.RETURNED
    if exchange.origin in _EXACT:
        return _EXACT[exchange.origin]
    if not exchange.trains and not config.mp_eval:
        return Reason.EVALUATION
    return _mismatch(exchange, exchange.backward) if exchange.backward is not None else None


def _mismatch(exchange: Exchange, backward: Exchange) -> str | None:
    """Returns the reason why the gradient of ``exchange`` cannot travel as the mirror image of it."""
    if backward.collective.name != exchange.collective.backward:
        return Reason.BACKWARD_COLLECTIVE.format(actual=backward.collective.name, expected=exchange.collective.backward)
    if backward.shape is None or exchange.shape is None or backward.shape[1:] != exchange.shape[1:]:
        return Reason.BACKWARD_SHAPE
    return Reason.BACKWARD_DTYPE.format(dtype=_name(backward)) if backward.dtype not in COMPRESSIBLE else None


def follow_forward(exchange: Exchange, forward: Decision) -> Decision:
    """Decides about the gradient of an exchange: it takes the offer that the forward takes."""
    if forward.offer is None:
        return dense(exchange, Reason.DENSE_FORWARD.format(reason=forward.reason))
    assert isinstance(forward.offer, RowOffer)
    assert forward.offer.backward_traffic is not None
    traffic = forward.offer.backward_traffic
    decision = Decision(exchange, forward.offer, forward.offer.backward_reason, exchange.dense_traffic.wire_bytes, traffic.wire_bytes)
    return replace(decision, traffic=traffic, link=forward.link)


def _name(exchange: Exchange) -> str:
    return str(exchange.dtype).removeprefix("torch.")
