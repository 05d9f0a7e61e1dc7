"""The report's forms (table, page, JSON, diff) show how often a step runs a site, and add up one step."""

import json
import weakref
from dataclasses import replace

import torch
from torch import nn

from dct_compile.report import GraphReport, Report, ReportRegistry, SiteReport
from dct_compile.report.table import COVERED

SITE = SiteReport("all_reduce", "gradient", "top.weight", (400,), "float32", "compressed", "gather", 1600, 40, "0", 2)
SITES = (
    replace(SITE, calls=0),
    replace(SITE, graph=1, calls=3),
    replace(SITE, graph=2, kind="activation", training=False, dense_bytes=500, wire_bytes=50),
)
GRAPHS = (GraphReport("graph 0/0", "", ""), GraphReport("graph 0/1", "", ""), GraphReport("DDP(Net) #2 bucket 0", "", ""))
REPORT = Report(SITES, GRAPHS, ("look here",))


def test_sums_are_those_of_a_step_and_of_an_evaluation() -> None:
    assert (REPORT.dense_bytes, REPORT.wire_bytes) == (4800, 120)
    assert str(REPORT).splitlines()[-4:] == [
        COVERED,
        "per rank and step: 4800 bytes dense, 120 on the wire (40.0x)",
        "per rank and evaluation: 500 bytes dense, 50 on the wire (10.0x)",
        "note: look here",
    ]
    assert json.loads(REPORT.to_json())["wire_bytes"] == 120


def test_where_nothing_trains_a_step_is_a_call() -> None:
    assert str(Report((SITES[2],), GRAPHS, ())).splitlines()[-1] == "per rank and step: 500 bytes dense, 50 on the wire (10.0x)"


def test_rows_name_their_graph_and_their_calls() -> None:
    lines = str(REPORT).splitlines()
    assert {"graph", "calls"} <= set(lines[0].split())
    for line, words in zip(
        lines[2:5], [("graph 0/0", " 0 "), ("graph 0/1", " 3 "), ("DDP(Net) #2 bucket 0", " 1 in evaluation ")], strict=True
    ):
        assert line.startswith(words[0])
        assert words[1] in line
    narrow = REPORT.table(width=100).splitlines()
    assert "DDP(Net) #2 bucket 0" in "\n".join(narrow)
    assert max(map(len, narrow)) <= 100


def test_the_page_shows_a_step_and_the_calls() -> None:
    page = " ".join(REPORT.to_html().split())
    assert "<dt>dense</dt><dd>4.8 kB</dd>" in page
    assert "An evaluation sends 50 B, dense 500 B." in page
    for words in ("graph 0/0, calls: 0<", "graph 0/1, calls: 3<", "DDP(Net) #2 bucket 0, calls: 1 in evaluation<"):
        assert words in page


def test_a_diff_compares_steps() -> None:
    text = str(REPORT.diff(Report((replace(SITE, calls=2),), GRAPHS[:1], ())))
    assert "compressed, 40 B, calls: 0" in text
    assert text.endswith("on the wire per rank and step: 120 bytes before, 80 after (-40)")


def test_a_retired_entry_may_be_gone_already() -> None:
    """After ``reset_report``, DDP still retires the buckets of before."""
    registry = ReportRegistry(called=True)
    entry = registry.add(GRAPHS[0], [(SITE, None)])
    registry.clear()
    registry.remove(entry)
    assert registry.snapshot().sites == ()


def test_an_entry_lives_as_long_as_its_owner() -> None:
    registry, owner = ReportRegistry(), nn.Linear(2, 2)
    registry.add(GRAPHS[0], [(SITE, None)]).owner = weakref.ref(owner)
    del owner
    assert len(registry.snapshot().sites) == 1, "a script may still print it"
    registry.add(GRAPHS[1], [(SITE, None)])
    assert [graph.name for graph in registry.snapshot().graphs] == ["graph 0/1"]


def test_a_reset_report_stays_without_the_graphs_of_before() -> None:
    registry = ReportRegistry(called=True)
    entry = registry.add(GRAPHS[0], [(SITE, None)])
    registry.serve(entry, [torch.zeros(2)])
    registry.clear()
    registry.serve(entry, [torch.zeros(2)])
    assert registry.snapshot().sites == ()
