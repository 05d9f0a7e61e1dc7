"""One compilation's addition to the report."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from dct_compile.report.data import DeferredGraph, GraphReport, SiteReport

Measure = Callable[[], tuple[float, int, str | None] | None]
"""Reads a site's achieved density and overflow from its counters, and how its parameters are stepped; ``None`` before its first step."""


@dataclass
class Use:
    """The calls of a graph with the same parameters. ``last``: the pass of the last one, see :class:`ReportRegistry`."""

    parameters: "list[weakref.ref[Tensor]]"
    last: int = 0

    @property
    def lives(self) -> bool:
        return all(ref() is not None for ref in self.parameters)


@dataclass(eq=False)
class ReportEntry:
    """The addition of one compilation to the report.

    ``training``: whether the graph has a backward. ``model``: the name of the DDP module that it belongs to, if it does. ``owner``: the
    object that runs it; when that is gone, so is the entry. An entry without an owner stays. ``uses``: by the parameters' identities.
    ``backwards``: the number of backwards that followed each other without a forward: those of one step. ``of_phase``: whether it is for
    one phase of a training, and left out of the report while another one runs.
    """

    graph: GraphReport | DeferredGraph
    sites: Sequence[tuple[SiteReport, Measure | None]]
    training: bool = True
    model: str = ""
    owner: "weakref.ref[object] | None" = None
    uses: dict[tuple[int, ...], Use] = field(default_factory=dict)
    backwards: int = 0
    of_phase: bool = False
    is_forward_last: bool = True

    @property
    def lives(self) -> bool:
        """Whether the graph can run again with parameters that it knows."""
        if self.owner is not None and self.owner() is None:
            return False
        return not self.uses or any(use.lives for use in self.uses.values())

    def forward_ran(self) -> None:
        """Ends the backwards of a step."""
        self.is_forward_last = True

    def backward_ran(self) -> None:
        """Counts a backward."""
        self.backwards = 1 if self.is_forward_last else self.backwards + 1
        self.is_forward_last = False

    def is_replaced_by(self, other: "ReportEntry", key: tuple[int, ...]) -> bool:
        """Whether calls with the parameters ``key`` go to ``other`` by now, another compilation of the same code."""
        if self is other or self.training != other.training or key not in other.uses or other.uses[key].last <= self.uses[key].last:
            return False
        code, is_same = self.graph.name.rpartition("/")[0], self.graph.name == other.graph.name
        # One compilation can hold several graphs: DDP's buckets cut it. They share a name, and no parameters.
        return bool(code) and code == other.graph.name.rpartition("/")[0] and (bool(key) or not is_same)

    def described(self) -> GraphReport:
        """Returns the description of the graph, made at the first call."""
        if isinstance(self.graph, DeferredGraph):
            self.graph = self.graph.describe()
        return self.graph


def sites_of(entries: Sequence[tuple[ReportEntry, int]], measured: bool) -> list[SiteReport]:
    """Returns the sites of ``entries``, each with its calls. ``measured``: reads their counters, which waits for the device."""
    return [
        replace(_measured(site, measure) if measured else site, graph=position, number=number, calls=calls, training=entry.training)
        for position, (entry, calls) in enumerate(entries)
        for number, (site, measure) in enumerate(entry.sites)
    ]


def _measured(site: SiteReport, measure: Measure | None) -> SiteReport:
    measured = measure() if measure is not None else None
    if measured is None:
        return site
    density, overflow, stepped = measured
    return replace(site, density=density, overflow=overflow, stepped=stepped)
