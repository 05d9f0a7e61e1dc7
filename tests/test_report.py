"""The report: what a table shows, sums and ratios, and what is forgotten."""

from dataclasses import replace

import dct_compile
from dct_compile.report import NOTHING_COMPILED, GraphReport, Report, ReportRegistry, SiteReport
from dct_compile.runtime import RUNTIME

MASKED = SiteReport(
    collective="all_to_all_single",
    kind="activation",
    name="model.py:12 in forward: y = exchange(x)",
    shape=(16, 64),
    dtype="float32",
    decision="compressed",
    reason="row threshold, 4 of 64 kept",
    dense_bytes=3072,
    wire_bytes=144,
    group="0",
    group_size=4,
    density=0.0625,
)
DENSE = replace(
    MASKED,
    collective="broadcast",
    name="model.py:13 in forward: z = broadcast(x)",
    decision="dense",
    reason="broadcast is not compressed",
    dense_bytes=1000,
    wire_bytes=1000,
    density=None,
)
GRAPH = GraphReport("graph 0/0", "before", "after")
EMPTY = Report((), (), (NOTHING_COMPILED,))


def cells(report: Report, row: int) -> list[str]:
    """The columns of one line of the table, split where two blanks are."""
    return [cell.strip() for cell in str(report).splitlines()[2 + row].split("  ") if cell.strip()]


def test_table_has_a_line_per_site() -> None:
    report = Report((MASKED, DENSE), (GRAPH,), ())
    header = str(report).splitlines()[0].split()
    places = ["collective", "kind", "name", "shape", "dtype"]
    assert header == [*places, "decision", "dense_B", "wire_B", "ratio", "density", "overflow", "reason"]
    assert cells(report, 0) == [
        "all_to_all_single",
        "activation",
        "model.py:12 in forward: y = exchange(x)",
        "16x64",
        "float32",
        "compressed",
        "3072",
        "144",
        "21.3",
        "0.0625",
        "row threshold, 4 of 64 kept",
    ]
    assert cells(report, 1)[5:] == ["dense", "1000", "1000", "1.0", "broadcast is not compressed"]


def test_totals() -> None:
    report = Report((MASKED, DENSE), (), ())
    assert (report.dense_bytes, report.wire_bytes) == (4072, 1144)
    assert str(report).splitlines()[-1] == "per rank and step: 4072 bytes dense, 1144 on the wire (3.6x)"


def test_overflow_is_shown() -> None:
    assert "17" in cells(Report((replace(MASKED, overflow=17),), (), ()), 0)


def test_long_names_and_reasons_are_shortened() -> None:
    long = replace(MASKED, name="n" * 200, reason="r" * 200)
    text = str(Report((long,), (), ()))
    assert "n" * 43 + "…" in text
    assert "n" * 44 not in text
    assert "r" * 59 + "…" in text
    assert long.name == "n" * 200


def test_site_that_sends_nothing() -> None:
    report = Report((replace(DENSE, dense_bytes=0, wire_bytes=0),), (), ())
    assert "per rank and step" not in str(report)
    assert cells(report, 0)[-3:] == ["0", "0", "broadcast is not compressed"]


def test_nothing_found() -> None:
    assert str(Report((), (), ())) == "no collectives found"
    assert str(Report((), (), ("look here", "and there"))) == "no collectives found\nnote: look here\nnote: and there"


def test_registry_collects_in_order() -> None:
    registry = ReportRegistry()
    registry.add(GRAPH, [(MASKED, None), (DENSE, None)])
    registry.add(replace(GRAPH, name="graph 1/0"), [(DENSE, None)])
    report = registry.snapshot()
    assert report.sites == (MASKED, DENSE, DENSE)
    assert [graph.name for graph in report.graphs] == ["graph 0/0", "graph 1/0"]


def test_counters_are_read_when_the_report_is_asked_for() -> None:
    measured: list[tuple[float, int]] = []
    registry = ReportRegistry()
    registry.add(GRAPH, [(MASKED, lambda: measured[-1] if measured else None)])
    assert registry.snapshot().sites == (MASKED,)
    measured.append((0.011, 3))
    early = registry.snapshot()
    measured.append((0.012, 4))
    assert (early.sites[0].density, early.sites[0].overflow) == (0.011, 3)
    assert registry.snapshot().sites[0].overflow == 4


def test_removed_entries_are_gone() -> None:
    registry = ReportRegistry()
    first = registry.add(GRAPH, [(MASKED, None)])
    twin = registry.add(GRAPH, [(DENSE, None)])
    registry.remove(first)
    assert registry.snapshot().sites == (DENSE,)
    registry.remove(twin)
    assert registry.snapshot() == EMPTY


def test_notes_are_said_once() -> None:
    registry = ReportRegistry(called=True)
    for text in ("a", "b", "a"):
        registry.note(text)
    assert registry.snapshot().notes == ("a", "b")


def test_cleared() -> None:
    registry = ReportRegistry()
    registry.add(GRAPH, [(MASKED, None)])
    registry.note("a")
    registry.clear()
    assert registry.snapshot() == EMPTY


def test_public_functions_read_and_reset_the_process_wide_report() -> None:
    dct_compile.reset_report()
    RUNTIME.reports.add(GRAPH, [(MASKED, None)])
    assert dct_compile.report().sites == (MASKED,)
    dct_compile.reset_report()
    assert dct_compile.report() == EMPTY
