"""Tables of sites as text."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tabulate import tabulate

from dct_compile.report.data import GraphReport, SiteReport, Sums, step_and_evaluation

Columns = dict[str, tuple[Callable[[SiteReport], Any], str]]
_COLUMNS: Columns = {
    "collective": (lambda site: site.collective, "g"),
    "kind": (lambda site: site.kind, "g"),
    "name": (lambda site: site.name, "g"),
    "shape": (lambda site: "x".join(map(str, site.shape)), "g"),
    "dtype": (lambda site: site.dtype, "g"),
    "decision": (lambda site: site.decision, "g"),
    "calls": (lambda site: calls(site), "g"),
    "dense_B": (lambda site: site.dense_bytes, "g"),
    "wire_B": (lambda site: site.wire_bytes, "g"),
    "ratio": (lambda site: site.ratio, ".1f"),
    "density": (lambda site: site.density, ".4f"),
    "overflow": (lambda site: site.overflow, "g"),
    "stepped": (lambda site: site.stepped, "g"),
    "reason": (lambda site: site.reason, "g"),
}
"""The value of each column and the format of its numbers."""
_WIDTHS = {"name": 44, "stepped": 40, "reason": 120}
"""Longer texts are shortened. Reasons that say what to do are shorter."""
_REASON_LINES = 3
"""A reason has so many lines where the texts of a site stand below each other."""
COVERED = "counted: collectives of compiled graphs, DDP, fully_shard and pipelines; not of the training loop"
_STACKED = ("graph", "collective", "kind", "name", "shape", "dtype", "decision", "stepped", "reason")
"""The columns that become one, where lines would be too long."""


def sites_table(sites: Sequence[SiteReport], graphs: Sequence[GraphReport], width: int | None = None, html: bool = False) -> str:
    """Returns a table with one line per site. Columns in which no site has a value are left out.

    Args:
        sites: The sites, in the order of the lines.
        graphs: The graphs that they belong to. Their names are a column where there are several.
        width: The longest line, in characters. Where lines would be longer, the texts of a site stand below each other in one column.
        html: Returns an HTML table instead of text.
    """
    if not sites:
        return "no collectives found"
    columns = {header: [read(site) for site in sites] for header, (read, _) in _columns(sites).items()}
    if len(graphs) > 1:
        columns = {"graph": [graphs[site.graph].name for site in sites], **columns}
    columns = {header: values for header, values in columns.items() if any(value is not None for value in values)}
    limits = {header: limit for header, limit in _WIDTHS.items() if header in columns}
    short = {header: [shorten(text or "", limit) for text in columns[header]] for header, limit in limits.items()}
    table = _tabulate({**columns, **short}, "html" if html else "simple")
    if width is None or len(table.partition("\n")[0]) <= width:
        return table
    numbers = {header: values for header, values in columns.items() if header not in _STACKED}
    left = max(30, width - len(_tabulate(numbers).partition("\n")[0]) - 2)
    names = columns.get("graph", [""] * len(sites))
    return _tabulate({"site": [_stacked(name, site, left) for name, site in zip(names, sites, strict=True)], **numbers})


def _columns(sites: Sequence[SiteReport]) -> Columns:
    """Returns the columns, with one for each scheme that would carry a site, in front of the density."""
    schemes: Columns = {f"{scheme}_B": (partial(_offered, scheme), "g") for scheme in schemes_offered(sites)}
    first = list(_COLUMNS).index("density")
    items = list(_COLUMNS.items())
    return dict([*items[:first], *schemes.items(), *items[first:]])


def schemes_offered(sites: Sequence[SiteReport]) -> list[str]:
    """Returns the names of all schemes among which a site had the choice."""
    return list(dict.fromkeys(scheme for site in sites for scheme in site.offers))


def _offered(scheme: str, site: SiteReport) -> int | None:
    return site.offers.get(scheme)


def _stacked(graph: str, site: SiteReport, width: int) -> str:
    tensor = f"{'x'.join(map(str, site.shape))} {site.dtype}"
    stepped = f"stepped: {site.stepped}" if site.stepped is not None else ""
    reason = textwrap.wrap(f"{site.decision}: {site.reason}", width, max_lines=_REASON_LINES, placeholder="…")
    lines = (graph, f"{site.kind}: {site.collective} {tensor}", site.name, *reason, stepped)
    return "\n".join(shorten(line, width) for line in lines if line)


def _tabulate(columns: Mapping[str, Sequence[Any]], style: str = "simple") -> str:
    formats = [_COLUMNS[header][1] if header in _COLUMNS else "g" for header in columns]
    return tabulate(list(zip(*columns.values(), strict=True)), list(columns), tablefmt=style, floatfmt=formats)


def totals(sites: Sequence[SiteReport]) -> list[str]:
    """Returns the bytes of one step, and of one evaluation if there is any, as lines; none where nothing is sent."""
    step, evaluation = step_and_evaluation(sites)
    named = [("step", step), ("evaluation", evaluation)]
    lines = [f"per rank and {name}: {_in_words(sums)}" for name, sums in named if sums is not None and sums.wire]
    return [COVERED, *lines] if lines else []


def calls(site: SiteReport) -> str | None:
    """Returns how often a step runs the site, where that is not once."""
    if site.training:
        return str(site.calls) if site.calls != 1 else None
    return f"{site.calls} in evaluation"


def _in_words(sums: Sums) -> str:
    return f"{sums.dense} bytes dense, {sums.wire} on the wire ({sums.dense / sums.wire:.1f}x)"


def shorten(text: str, width: int) -> str:
    """Returns ``text`` cut to ``width`` characters, the last one an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"
