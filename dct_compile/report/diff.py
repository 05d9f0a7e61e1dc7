"""The differences between two reports of one model, site by site."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from dct_compile.report.data import SiteReport, step_and_evaluation
from dct_compile.report.table import calls, shorten

_WIDTH = 40
"""Longer names and reasons are shortened."""


@dataclass(frozen=True)
class SiteChange:
    """One site in both reports; ``None`` in the report that lacks it."""

    before: SiteReport | None
    after: SiteReport | None

    @property
    def site(self) -> SiteReport:
        """The side that exists, the later one where both do."""
        site = self.after or self.before
        assert site is not None
        return site

    @property
    def wire_bytes(self) -> int:
        """Bytes on the wire gained (positive) or saved (negative), per rank and call."""
        return sum(side.wire_bytes * sign for side, sign in ((self.after, 1), (self.before, -1)) if side is not None)

    def is_different(self) -> bool:
        if self.before is None or self.after is None:
            return True
        return _verdict(self.before) != _verdict(self.after)


@dataclass(frozen=True)
class ReportDiff:
    """The sites of two reports; ``str(diff)`` is a table of those that differ, and of the totals."""

    changes: tuple[SiteChange, ...]

    @property
    def different(self) -> tuple[SiteChange, ...]:
        return tuple(change for change in self.changes if change.is_different())

    def __str__(self) -> str:
        if not self.different:
            return f"no site differs ({len(self.changes)} compared)"
        rows = [[_title(change.site), _cell(change.before), _cell(change.after), f"{change.wire_bytes:+d}"] for change in self.different]
        headers = ["site", "before", "after", "wire_B"]
        text = tabulate(rows, headers, disable_numparse=True, colalign=["left"] * 3 + ["right"])
        before = step_and_evaluation(change.before for change in self.changes if change.before is not None)[0].wire
        after = step_and_evaluation(change.after for change in self.changes if change.after is not None)[0].wire
        same = len(self.changes) - len(self.different)
        sums = f"on the wire per rank and step: {before} bytes before, {after} after ({after - before:+d})"
        return f"{text}\n{same} more sites are the same\n{sums}"


def compare(before: Sequence[SiteReport], after: Sequence[SiteReport]) -> ReportDiff:
    """Matches sites by collective, kind and name, in their order where several are alike."""
    waiting: dict[tuple[str, ...], list[SiteReport]] = defaultdict(list)
    for site in after:
        waiting[_identity(site)].append(site)
    changes = []
    for site in before:
        found = waiting[_identity(site)]
        changes.append(SiteChange(site, found.pop(0) if found else None))
    left = {id(site) for sites in waiting.values() for site in sites}
    changes += [SiteChange(None, site) for site in after if id(site) in left]
    return ReportDiff(tuple(changes))


def _identity(site: SiteReport) -> tuple[str, ...]:
    return site.collective, site.kind, site.name


def _verdict(site: SiteReport) -> tuple[object, ...]:
    return site.decision, site.reason, site.shape, site.dtype, site.dense_bytes, site.wire_bytes, calls(site)


def _title(site: SiteReport) -> str:
    return f"{site.kind}: {site.collective}\n{shorten(site.name, _WIDTH)}"


def _cell(site: SiteReport | None) -> str:
    if site is None:
        return "not there"
    times = f", calls: {calls(site)}" if calls(site) is not None else ""
    return f"{site.decision}, {site.wire_bytes} B{times}\n{shorten(site.reason, _WIDTH)}"
