"""The report as users hold it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dct_compile.report import page
from dct_compile.report.data import GraphReport, SiteReport
from dct_compile.report.diff import ReportDiff, compare
from dct_compile.report.table import sites_table, totals


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
        return self.table()

    def table(self, width: int | None = None) -> str:
        """Sites, totals and notes as text; where lines would exceed ``width`` characters, a site takes several shorter ones."""
        text = sites_table(self.sites, width)
        if self.wire_bytes:
            text += "\n" + totals(self.dense_bytes, self.wire_bytes)
        return text + "".join(f"\nnote: {note}" for note in self.notes)

    def to_json(self, path: str | Path | None = None) -> str:
        """Totals, sites, graphs (code and nodes) and notes as JSON, also written to ``path`` if given. Raises ``OSError``."""
        text = json.dumps({"dense_bytes": self.dense_bytes, "wire_bytes": self.wire_bytes, **asdict(self)}, indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None, title: str = "Collectives, dense and on the wire") -> str:
        """One self-contained page, also written to ``path`` if given: sites, graphs side by side, and a drawing of every region.

        ``title`` is its headline. It quotes the source lines that issued the nodes. Raises ``OSError``.
        """
        text = page.render(title, self.sites, self.graphs, self.notes)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return page.summary(self.sites, self.notes)

    def diff(self, other: "Report") -> ReportDiff:
        """What changes from this report to ``other``, such as one of the same model with another option; ``str`` of it is a table."""
        return compare(self.sites, other.sites)
