"""The decision about one exchange: the offer that is taken, or the reason why it stays dense; with bytes and seconds before and after."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dct_compile.exchange import GRADIENT, Exchange
from dct_compile.link import Link
from dct_compile.passes.sites import Site
from dct_compile.reasons import Reason
from dct_compile.schemes import GradientOffer, Offer
from dct_compile.traffic import NOTHING, Traffic


@dataclass(frozen=True)
class Decision:
    """The decision about one exchange.

    ``offer``: the offer taken, ``None`` for dense. The exchange of a gradient has the offer of its forward. ``reason``: the words of the
    report. ``dense_bytes``, ``wire_bytes``: sent per rank and call, before and after. ``offers``: the wire bytes of every scheme that made
    an offer, where one was turned down. ``site``: its place in a graph, ``None`` for an exchange outside of graphs. ``traffic``: the work
    per rank and call, as it was decided. ``link``: the link of the group, where it was looked at.
    """

    exchange: Exchange
    offer: Offer | None
    reason: str
    dense_bytes: int
    wire_bytes: int
    offers: Mapping[str, int] = field(default_factory=dict)
    site: Site | None = None
    traffic: Traffic = NOTHING
    link: Link | None = None

    @property
    def compressed(self) -> bool:
        return self.offer is not None

    @property
    def scheme(self) -> str:
        """The name of the scheme, "dense" for none."""
        return self.offer.scheme if self.offer is not None else "dense"

    @property
    def digest(self) -> str:
        """The text that must be equal on all ranks."""
        return f"{self.scheme}: {self.offer.digest}" if self.offer is not None else "dense"

    @property
    def seconds(self) -> float | None:
        """Predicted seconds per call where nothing else runs, ``None`` where the link is not known."""
        return self.traffic.seconds(self.link) if self.link is not None else None

    @property
    def dense_seconds(self) -> float | None:
        """Predicted seconds of the dense collective."""
        return self.exchange.dense_traffic.seconds(self.link) if self.link is not None else None


def dense(exchange: Exchange, reason: str) -> Decision:
    """Returns the decision to leave ``exchange`` as it is, for ``reason``."""
    size = exchange.dense_traffic.wire_bytes
    return Decision(exchange, None, str(reason), size, size, traffic=exchange.dense_traffic)


def held_until(decision: Decision, exchanges: int | None) -> Decision:
    """Adds to the reason of a gradient's decision that another phase follows after ``exchanges`` exchanges, if one does."""
    depends = isinstance(decision.offer, GradientOffer) or bool(decision.offers)
    if exchanges is None or decision.exchange.kind != GRADIENT:
        return decision
    if decision.reason == Reason.DP_DENSITY_ONE:
        return replace(decision, reason=Reason.DENSE_UNTIL.format(number=exchanges))
    return replace(decision, reason=Reason.UNTIL.format(reason=decision.reason, number=exchanges)) if depends else decision
