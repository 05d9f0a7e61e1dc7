"""Collects what compilations report, for as long as the process lives."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dct_compile.report.data import DeferredGraph, GraphReport, SiteReport
from dct_compile.report.report import Report

Measure = Callable[[], tuple[float, int] | None]
"""Reads a site's achieved density and overflow from its counters; ``None`` before its first step."""


NOTHING_COMPILED = (
    "backend 'dct' has not been called: no compiled function has run yet, or torch.compile skipped the model "
    "(it does so for torch's own modules inside DDP, such as DDP(nn.Sequential(...)): make them part of a module class of your own)"
)
GRADIENTS_OUTSIDE = (
    "no gradient is in this table: the model is not wrapped in DDP and its graphs do not average gradients. What the training loop reduces"
    " itself, as by all_reduce of parameter.grad, stays dense and unseen; DDP or option data_parallel=True lets the backend do it"
)


@dataclass
class ReportEntry:
    """The addition of one compilation to the report."""

    graph: GraphReport | DeferredGraph
    sites: Sequence[tuple[SiteReport, Measure | None]]

    def described(self) -> GraphReport:
        """Returns the description of the graph, made at the first call."""
        if isinstance(self.graph, DeferredGraph):
            self.graph = self.graph.describe()
        return self.graph


@dataclass
class ReportRegistry:
    """Collects what compilations report.

    ``called``: whether the backend has been asked to compile anything. ``trains_alone``: whether a graph returned gradients of parameters
    on one of several ranks, with neither DDP nor ``data_parallel`` to average them.
    """

    entries: list[ReportEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    called: bool = False
    trains_alone: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)
    """Models may be trained, and compiled, in several threads."""

    def add(self, graph: GraphReport | DeferredGraph, sites: Sequence[tuple[SiteReport, Measure | None]]) -> ReportEntry:
        entry = ReportEntry(graph, sites)
        with self._lock:
            self.entries.append(entry)
        return entry

    def remove(self, entry: ReportEntry) -> None:
        with self._lock:
            if entry in self.entries:
                self.entries.remove(entry)

    def note(self, text: str) -> None:
        """Adds a note once."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def clear(self) -> None:
        with self._lock:
            self.entries.clear()
            self.notes.clear()
            self.trains_alone = False

    def snapshot(self) -> Report:
        with self._lock:
            entries = list(self.entries)
        sites = [
            replace(_measured(site, measure), graph=position, number=number)
            for position, entry in enumerate(entries)
            for number, (site, measure) in enumerate(entry.sites)
        ]
        return Report(tuple(sites), tuple(entry.described() for entry in entries), (*self.notes, *self._hints(sites)))

    def _hints(self, sites: Sequence[SiteReport]) -> list[str]:
        """Returns notes about what is missing, as far as is known by now."""
        if not self.called:
            return [NOTHING_COMPILED]
        return [GRADIENTS_OUTSIDE] if self.trains_alone and not any(site.kind == "gradient" for site in sites) else []


def _measured(site: SiteReport, measure: Measure | None) -> SiteReport:
    measured = measure() if measure is not None else None
    return replace(site, density=measured[0], overflow=measured[1]) if measured is not None else site
