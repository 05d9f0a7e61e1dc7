"""What has been compiled in this process: every collective found, what was decided about it and why, what it sends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tabulate import tabulate

Measure = Callable[[], tuple[float, int] | None]
"""Reads a site's achieved density and overflow from its counters; ``None`` before its first step."""


NOTHING_COMPILED = (
    "backend 'dct' has not been called: no compiled function has run yet, or torch.compile skipped the model "
    "(it does so for torch's own modules inside DDP, such as DDP(nn.Sequential(...)): make them part of a module class of your own)"
)


@dataclass(frozen=True)
class SiteReport:
    """One collective.

    ``kind``: "gradient", "activation", "activation_gradient", "embedding", "embedding_gradient" or "other". ``name``: the parameters
    whose gradient it carries, else the source line. ``decision``: "compressed" or "dense", for ``reason``. ``dense_bytes``,
    ``wire_bytes``: sent per rank and call before and after, metadata and padding included. ``density``: fraction of the elements sent so
    far (for row thresholds: of a row's elements that its payload holds). ``overflow``: entries above the threshold that found no room in
    a payload so far; error feedback keeps them in the residual.
    """

    collective: str
    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    decision: str
    reason: str
    dense_bytes: int
    wire_bytes: int
    group: str
    group_size: int
    density: float | None = None
    overflow: int | None = None


@dataclass(frozen=True)
class GraphReport:
    """A rewritten graph as readable code, before and after."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """A snapshot; ``str(report)`` is a table. ``notes`` tell what no site can: why nothing was looked at, what was not compiled."""

    sites: tuple[SiteReport, ...]
    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...]

    @property
    def dense_bytes(self) -> int:
        return sum(site.dense_bytes for site in self.sites)

    @property
    def wire_bytes(self) -> int:
        return sum(site.wire_bytes for site in self.sites)

    def __str__(self) -> str:
        rows = [
            [
                site.collective,
                site.kind,
                _shorten(site.name, 44),
                "x".join(map(str, site.shape)),
                site.dtype,
                site.decision,
                site.dense_bytes,
                site.wire_bytes,
                site.dense_bytes / site.wire_bytes if site.wire_bytes else None,
                site.density,
                site.overflow,
                _shorten(site.reason, 60),
            ]
            for site in self.sites
        ]
        headers = [
            "collective",
            "kind",
            "name",
            "shape",
            "dtype",
            "decision",
            "dense_B",
            "wire_B",
            "ratio",
            "density",
            "overflow",
            "reason",
        ]
        text = tabulate(rows, headers, floatfmt=[*["g"] * 8, ".1f", ".4f", "g", "g"]) if rows else "no collectives found"
        if self.wire_bytes:
            ratio = self.dense_bytes / self.wire_bytes
            text += f"\nper rank and step: {self.dense_bytes} bytes dense, {self.wire_bytes} on the wire ({ratio:.1f}x)"
        return text + "".join(f"\nnote: {note}" for note in self.notes)


@dataclass
class ReportEntry:
    """What one compilation added to the report."""

    graph: GraphReport
    sites: Sequence[tuple[SiteReport, Measure | None]]


@dataclass
class ReportRegistry:
    """Collects what compilations report. ``called``: whether the backend has been asked to compile anything."""

    entries: list[ReportEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    called: bool = False

    def add(self, graph: GraphReport, sites: Sequence[tuple[SiteReport, Measure | None]]) -> ReportEntry:
        entry = ReportEntry(graph, sites)
        self.entries.append(entry)
        return entry

    def remove(self, entry: ReportEntry) -> None:
        self.entries.remove(entry)

    def note(self, text: str) -> None:
        """Adds a note once."""
        if text not in self.notes:
            self.notes.append(text)

    def clear(self) -> None:
        self.entries.clear()
        self.notes.clear()

    def snapshot(self) -> Report:
        sites = [_measured(site, measure) for entry in self.entries for site, measure in entry.sites]
        notes = self.notes if self.called else [*self.notes, NOTHING_COMPILED]
        return Report(tuple(sites), tuple(entry.graph for entry in self.entries), tuple(notes))


def _measured(site: SiteReport, measure: Measure | None) -> SiteReport:
    measured = measure() if measure is not None else None
    return replace(site, density=measured[0], overflow=measured[1]) if measured is not None else site


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
