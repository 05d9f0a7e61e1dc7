"""A report as one HTML page that needs nothing else: sites, drawings of their regions, graphs side by side, source lines."""

import linecache
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from dct_compile.link import duration
from dct_compile.report.alignment import Block, align, stretches
from dct_compile.report.data import GraphReport, NodeReport, SiteReport, step_and_evaluation
from dct_compile.report.drawing import HEIGHT, WIDTH, Drawing, draw
from dct_compile.report.table import COVERED, calls, schemes_offered, sites_table, totals
from dct_compile.version import own_version

KINDS = (
    "gradient",
    "sharded_gradient",
    "parameter",
    "activation",
    "activation_gradient",
    "embedding",
    "embedding_gradient",
    "buffers",
    "other",
)
_AROUND = 1
"""Source lines that are shown on either side of one that issued a node."""
_CARD = 520
"""The width in pixels that a card has for its drawing where two stand side by side. A wider drawing has the whole row."""


@dataclass(frozen=True)
class Region:
    """A site, or a forward site and its backward, and a drawing of both (``None`` where no graph was kept)."""

    sites: tuple[SiteReport, ...]
    drawing: Drawing | None


@dataclass(frozen=True)
class Part:
    """A stretch of a graph: blocks that are shown, or ``hidden`` nodes, which begin at ``start`` of the graph's collapsed ones."""

    blocks: Sequence[Block]
    start: int
    hidden: int


@dataclass(frozen=True)
class GraphView:
    """One graph as the page shows it; ``collapsed``: its unchanged nodes, one list of plain values each, for the page's script."""

    report: GraphReport
    parts: list[Part]
    collapsed: list[list[Any]]

    @property
    def changes(self) -> tuple[int, int]:
        """The number of nodes that went, and the number of nodes that came."""
        changed = [block for part in self.parts for block in part.blocks if not block.is_kept]
        return sum(len(block.before) for block in changed), sum(len(block.after) for block in changed)


@dataclass(frozen=True)
class Excerpt:
    """Lines of one file in order: (number, text, whether it issued a node); ``None`` stands for lines left out."""

    path: str
    number: int
    lines: list[tuple[int, str, bool] | None]


def render(
    title: str, sites: Sequence[SiteReport], graphs: Sequence[GraphReport], notes: Sequence[str], facts: Mapping[str, str] | None = None
) -> str:
    """Returns the whole page, under the headline ``title``. ``facts`` stand beside the versions and the date."""
    step, evaluation = step_and_evaluation(sites)
    sources = _Sources(node for graph in graphs for node in graph.nodes_before)
    scale = _Scale(sites)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            sites=sites,
            notes=notes,
            facts={**(facts or {}), "dct-compile": own_version(), "torch": torch.__version__, "date": date.today().isoformat()},
            seconds=_seconds(sites),
            step=step,
            evaluation=evaluation,
            covered=COVERED,
            scale=scale,
            kinds=[kind for kind in KINDS if any(site.kind == kind for site in sites)],
            decisions=sorted({site.decision for site in sites}),
            schemes=schemes_offered(sites),
            compressed=sum(site.decision == "compressed" for site in sites),
            regions=list(_regions(sites, graphs)),
            graphs=[_view(graph, sources) for graph in graphs],
            sources=sources,
            card=_CARD,
            box_width=WIDTH,
            box_height=HEIGHT,
        )
    )


def summary(sites: Sequence[SiteReport], graphs: Sequence[GraphReport], notes: Sequence[str]) -> str:
    """Table, totals and notes as a fragment of HTML, for notebooks."""
    lines = [*totals(sites), *(f"note: {note}" for note in notes)]
    return "\n".join([sites_table(sites, graphs, html=True), *(f"<p>{escape(line)}</p>" for line in lines)])


def human(size: float) -> str:
    """Bytes in decimal units, three digits: ``65.5 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError("the last unit returns")


def _seconds(sites: Sequence[SiteReport]) -> tuple[str, str] | None:
    """Returns the predicted time of a step's exchanges, dense and as decided; ``None`` where no link is known."""
    trained = [site for site in sites if site.training] or sites
    weighed = [(site.calls, site.dense_seconds, site.seconds) for site in trained]
    known = [(calls, dense, own) for calls, dense, own in weighed if dense is not None and own is not None]
    if not known:
        return None
    return duration(sum(calls * dense for calls, dense, _ in known)), duration(sum(calls * own for calls, _, own in known))


class _Scale:
    """Lengths of bars in percent of the longest: by powers of ten, and in proportion."""

    def __init__(self, sites: Sequence[SiteReport]) -> None:
        sizes = [size for site in sites for size in (site.dense_bytes, site.wire_bytes) if size]
        self.largest = max(sizes, default=1)
        self.low = math.floor(math.log10(min(sizes, default=1)))
        self.high = max(self.low + 1, math.ceil(math.log10(self.largest)))

    def log(self, size: int) -> float:
        return round(100 * (math.log10(size) - self.low) / (self.high - self.low), 2) if size else 0.0

    def linear(self, size: int) -> float:
        return round(100 * size / self.largest, 2)

    @property
    def caption(self) -> str:
        return f"log scale, {human(10**self.low)} to {human(10**self.high)}"


class _Sources:
    """The files behind the nodes, numbered, with the lines that issued them."""

    def __init__(self, nodes: Iterable[NodeReport]) -> None:
        lines: dict[str, dict[int, str]] = defaultdict(dict)
        for node in nodes:
            if node.source:
                path, _, line = node.source.rpartition(":")
                lines[path][int(line)] = node.code
        self.numbers = {path: number for number, path in enumerate(lines)}
        self.excerpts = [_excerpt(path, number, lines[path]) for path, number in self.numbers.items()]

    def anchor(self, source: str) -> str:
        """Returns the id of a line on the page, ``""`` for a line that no node comes from."""
        path, _, line = source.rpartition(":")
        return f"src-{self.numbers[path]}-{line}" if path in self.numbers else ""


def _excerpt(path: str, number: int, issued: dict[int, str]) -> Excerpt:
    shown = sorted({line for center in issued for line in range(max(1, center - _AROUND), center + _AROUND + 1)})
    lines: list[tuple[int, str, bool] | None] = []
    for line in shown:
        if lines and lines[-1] is not None and lines[-1][0] != line - 1:
            lines.append(None)
        text = linecache.getline(path, line).rstrip() or issued.get(line, "")
        lines.append((line, text, line in issued))
    return Excerpt(path, number, lines)


def _regions(sites: Sequence[SiteReport], graphs: Sequence[GraphReport]) -> Iterable[Region]:
    found = {(site.graph, site.number): site for site in sites}
    for site in sites:
        pair = found.get((site.graph, site.pair)) if site.pair is not None else None
        if pair is not None and pair.number < site.number:
            continue  # drawn with the forward
        together = (site,) if pair is None else (site, pair)
        nodes = graphs[site.graph].nodes_after if site.graph < len(graphs) else ()
        yield Region(together, draw(nodes, {member.number for member in together}) if nodes else None)


def _view(graph: GraphReport, sources: _Sources) -> GraphView:
    parts: list[Part] = []
    collapsed: list[list[Any]] = []
    for stretch in stretches(align(graph.nodes_before, graph.nodes_after)):
        if not stretch.collapsed:
            parts.append(Part(stretch.blocks, 0, 0))
            continue
        parts.append(Part((), len(collapsed), len(stretch.blocks)))
        for node in (node for block in stretch.blocks for node in block.before):
            place = Path(node.source).name
            collapsed.append([node.name, node.operator, ", ".join(node.inputs), describe(node), place, sources.anchor(node.source)])
    return GraphView(graph, parts, collapsed)


def describe(node: NodeReport) -> str:
    """Shape, dtype and size of a node's result."""
    return f"{'x'.join(map(str, node.shape)) or 'scalar'} {node.dtype}, {node.size:,} B" if node.shape is not None else ""


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dct_compile.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(human=human, describe=describe, calls=calls, file=lambda source: Path(source).name)
    return environment
