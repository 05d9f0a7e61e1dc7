"""The report: what a table shows, sums and ratios, and what is forgotten."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import dct_compile
from dct_compile.reasons import Reason
from dct_compile.report import NOTHING_COMPILED, GraphReport, NodeReport, Report, ReportRegistry, SiteReport
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
    assert header == [*places, "decision", "dense_B", "wire_B", "ratio", "density", "reason"]
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


def test_columns_without_a_value_are_left_out() -> None:
    plain = replace(MASKED, density=None)
    gradient = replace(plain, offers={"gather": 200, "owner": 144}, overflow=3)
    assert not {"density", "overflow", "gather_B", "owner_B"} & set(str(Report((plain,), (), ())).split())
    assert {"overflow", "gather_B", "owner_B"} <= set(str(Report((plain, gradient), (), ())).split())


def test_table_fits_a_narrow_terminal() -> None:
    report = Report((replace(MASKED, reason="r" * 200), replace(DENSE, name="n" * 200)), (GRAPH,), ("look here",))
    assert report.table(width=1000) == str(report)
    text = report.table(width=100)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for word in (
        "activation: all_to_all_single 16x64 float32",
        MASKED.name[:20],
        "compressed: rrr",
        "broadcast",
        "dense: broadcast is not",
        "3072",
        "21.3",
        "look here",
    ):
        assert word in text
    assert len([line for line in lines if "…" in line]) == 2 + (len(MASKED.name) > 40)


@pytest.mark.parametrize("width", [None, 100])
def test_a_reason_is_read_to_its_remedy(width: int | None) -> None:
    report = Report((replace(DENSE, reason=Reason.ONE_MACHINE), MASKED), (GRAPH,), ())
    text = " ".join(line[:62].strip() if width else line for line in report.table(width).splitlines())
    assert Reason.ONE_MACHINE in text


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
    assert "r" * 119 + "…" in text
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
    assert report.sites == (MASKED, replace(DENSE, number=1), replace(DENSE, graph=1))
    assert [graph.name for graph in report.graphs] == ["graph 0/0", "graph 1/0"]


def test_counters_are_read_when_the_report_is_asked_for() -> None:
    measured: list[tuple[float, int, str]] = []
    registry = ReportRegistry()
    registry.add(GRAPH, [(MASKED, lambda: measured[-1] if measured else None)])
    assert registry.snapshot().sites == (MASKED,)
    measured.append((0.011, 3, "not stepped yet"))
    early = registry.snapshot()
    measured.append((0.012, 4, "bypass"))
    assert (early.sites[0].density, early.sites[0].overflow, early.sites[0].stepped) == (0.011, 3, "not stepped yet")
    assert (registry.snapshot().sites[0].overflow, registry.snapshot().sites[0].stepped) == (4, "bypass")


def test_removed_entries_are_gone() -> None:
    registry = ReportRegistry()
    first = registry.add(GRAPH, [(MASKED, None)])
    twin = registry.add(GRAPH, [(DENSE, None)])
    registry.remove(first)
    assert registry.snapshot().sites == (DENSE,), "graphs are counted anew"
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


def test_public_functions_read_and_reset_the_process_wide_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUNTIME.reports, "called", False)  # other tests of this process may have called the backend
    dct_compile.reset_report()
    RUNTIME.reports.add(GRAPH, [(MASKED, None)])
    assert dct_compile.report().sites == (MASKED,)
    dct_compile.reset_report()
    assert dct_compile.report() == EMPTY


def test_json_holds_everything(tmp_path: Path) -> None:
    node = NodeReport("y", "aten.relu.default", ("x",), (16, 64), "float32", 4096, "model.py:12", "y = relu(x)", 0, False)
    report = Report((MASKED, DENSE), (replace(GRAPH, nodes_after=(node,)),), ("look here",))
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == text == report.to_json()
    read = json.loads(text)
    assert (read["dense_bytes"], read["wire_bytes"], read["notes"]) == (4072, 1144, ["look here"])
    assert [SiteReport(**{**site, "shape": tuple(site["shape"])}) for site in read["sites"]] == [MASKED, DENSE]
    assert read["graphs"][0]["nodes_after"][0]["inputs"] == ["x"]
    assert read["graphs"][0]["before"] == "before"


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Report((), (), ()).to_json(tmp_path / "nowhere" / "report.json")


def test_diff_of_equal_reports() -> None:
    report = Report((MASKED, DENSE), (), ())
    measured = Report((replace(MASKED, density=0.03, overflow=7), DENSE), (), ())
    assert report.diff(measured).different == ()
    assert str(report.diff(measured)) == "no site differs (2 compared)"


def test_diff_tells_what_an_option_changes() -> None:
    before = Report((MASKED, DENSE), (), ())
    left = replace(MASKED, decision="dense", reason="mp_density=1 keeps everything", wire_bytes=3072)
    added = replace(DENSE, name="z", dense_bytes=10, wire_bytes=10)
    diff = before.diff(Report((left, added), (), ()))
    assert [(change.before, change.after) for change in diff.changes] == [(MASKED, left), (DENSE, None), (None, added)]
    assert [change.wire_bytes for change in diff.different] == [2928, -1000, 10]
    text = str(diff)
    for words in ("compressed, 144 B", "row threshold, 4 of 64 kept", "dense, 3072 B", "mp_density=1 keeps everything"):
        assert words in text
    assert text.count("not there") == 2
    assert text.endswith("0 more sites are the same\non the wire per rank and step: 1144 bytes before, 3082 after (+1938)")


def test_diff_pairs_sites_that_look_alike_in_order() -> None:
    """A block that is called three times: the same line, the same kind."""
    sites = tuple(replace(MASKED, number=number, wire_bytes=100 + number) for number in range(3))
    shrunk = tuple(replace(site, wire_bytes=site.wire_bytes - 50) for site in sites)
    assert [change.wire_bytes for change in Report(sites, (), ()).diff(Report(shrunk, (), ())).changes] == [-50, -50, -50]


def test_notebook_shows_a_table() -> None:
    text = Report((replace(MASKED, name="<b>"),), (), ("a < b",))._repr_html_()
    assert text.startswith("<table>")
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "note: a &lt; b" in text
    assert "per rank and step: 3072 bytes dense, 144 on the wire (21.3x)" in text
    assert "no collectives found" in Report((), (), ())._repr_html_()
