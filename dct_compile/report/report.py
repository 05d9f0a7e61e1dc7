"""The report as users hold it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dct_compile.report import page
from dct_compile.report.data import GraphReport, SiteReport, step_and_evaluation
from dct_compile.report.diff import ReportDiff, compare
from dct_compile.report.table import sites_table, totals


@dataclass(frozen=True)
class Report:
    """A snapshot; ``str(report)`` is a table.

    ``notes`` hold what belongs to no site: why no graph was examined, or what was not compiled. ``dense_bytes``, ``wire_bytes``: sent per
    rank by one training step, a forward with its backward, before and after. Graphs without a backward count only where none has one.
    """

    sites: tuple[SiteReport, ...]
    graphs: tuple[GraphReport, ...]
    notes: tuple[str, ...]

    @property
    def dense_bytes(self) -> int:
        return step_and_evaluation(self.sites)[0].dense

    @property
    def wire_bytes(self) -> int:
        return step_and_evaluation(self.sites)[0].wire

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None) -> str:
        """Returns sites, totals and notes as text.

        Args:
            width: The longest line, in characters. Where lines would exceed it, a site takes several shorter ones. ``None`` sets no limit.
        """
        lines = [sites_table(self.sites, self.graphs, width), *totals(self.sites), *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns totals, sites, graphs (code and nodes) and notes as JSON.

        Args:
            path: The file to write the text to, if given.

        Raises:
            OSError: The file cannot be written.
        """
        text = json.dumps({"dense_bytes": self.dense_bytes, "wire_bytes": self.wire_bytes, **asdict(self)}, indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_html(
        self,
        path: str | Path | None = None,
        title: str = "Collectives, dense and on the wire",
        facts: Mapping[str, str] | None = None,
    ) -> str:
        """Returns one self-contained page: sites, graphs side by side, and a drawing of every region.

        The page quotes the source lines that issued the nodes.

        Args:
            path: The file to write the page to, if given.
            title: The headline of the page.
            facts: What else the page should say of itself, such as ``{"options": "dp_density=0.005"}``. Versions and date are there.

        Raises:
            OSError: The file cannot be written.
        """
        text = page.render(title, self.sites, self.graphs, self.notes, facts)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return page.summary(self.sites, self.graphs, self.notes)

    def diff(self, other: "Report") -> ReportDiff:
        """Compares this report with ``other``, such as one of the same model with another option.

        Args:
            other: The later report.

        Returns:
            The changes from this report to ``other``; ``str`` of it is a table.
        """
        return compare(self.sites, other.sites)
