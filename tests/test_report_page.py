"""The page: self-contained, well-formed, every link leads somewhere."""

import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import dct_compile
from dct_compile.inspection import fake_ranks
from dct_compile.report import GraphReport, NodeReport, Report, SiteReport, page
from tests.reports import explained_report, large_report
from tests.test_inspect import Net

CSS = (Path(page.__file__).parent / "page.css").read_text()
VOID = {"meta", "br", "rect", "path"}


class Outline(HTMLParser):
    """Collects ids, attributes and texts, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture
def report() -> Report:
    return explained_report()


@pytest.fixture
def large() -> Report:
    return large_report()


def test_is_self_contained_and_well_formed(report: Report, tmp_path: Path) -> None:
    text = report.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == text
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.values("src") == []
    assert not re.search(r"@import|url\((?!#)", text)
    links = outline.values("href")
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} <= set(outline.ids)


def test_every_site_has_a_row_a_drawing_and_a_place_in_its_graph(report: Report) -> None:
    outline = Outline(report.to_html())
    assert len(report.sites) == 3
    for site in report.sites:
        for part in ("site", "region", "graph"):
            assert f"{part}-{site.graph}-{site.number}" in outline.ids
        for size in (site.dense_bytes, site.wire_bytes):
            assert f"{size:,} B" in outline.texts
        assert any(site.reason in text for text in outline.texts)
    forward, backward = (site for site in report.sites if site.pair is not None)
    assert (forward.pair, backward.pair) == (backward.number, forward.number)
    assert f"#site-{backward.graph}-{backward.number}" in outline.values("href")
    assert [name for _, key, name in outline.attributes if key == "class" and name == "edge mask"], "the mask is drawn"


def test_nodes_lead_to_the_users_lines(report: Report) -> None:
    text = report.to_html()
    outline = Outline(text)
    path, _, line = next(site.source for site in report.sites if site.kind == "activation").rpartition(":")
    assert Path(path).name == "small_models.py"
    quoted = Path(path).read_text().splitlines()[int(line) - 1]
    assert "all_to_all_single_autograd" in quoted
    assert html.escape(quoted) in text
    assert any(anchor.endswith(f"-{line}") for anchor in outline.ids if anchor.startswith("src-"))


def test_every_node_is_on_the_page(report: Report, large: Report) -> None:
    for shown in (report, large):
        text = shown.to_html()
        graph = shown.graphs[0]
        collapsed = json.loads(re.findall(r'id="collapsed-0">(.*?)</script>', text, re.DOTALL)[0])
        names = set(re.findall(r"<b>(\w+)</b> = ", text)) | {node[0] for node in collapsed}
        assert {node.name for node in (*graph.nodes_before, *graph.nodes_after)} <= names
        assert len(collapsed) > 20
        counts = re.findall(r'data-start="(\d+)" data-count="(\d+)"', text)
        assert sum(int(count) for _, count in counts) == len(collapsed)
    assert len(text) < 3_000_000
    assert text.count('class="row"') < 500


def test_hostile_names_are_text() -> None:
    attack = "</script><img src=x onerror=alert(1)>"
    site = SiteReport("all_reduce", "gradient", attack, (1,), "float32", "dense", attack, 10, 10, "0", 2, source=f"{attack}:3")
    nodes = tuple(NodeReport(f"n{i}", attack, (attack,), None, "", 0, f"{attack}:3", attack, None, False) for i in range(20))
    outline = Outline(Report((site,), (GraphReport(attack, "", "", nodes, nodes),), (attack,)).to_html())
    assert "img" not in {tag for tag, _, _ in outline.attributes}


def test_reports_without_graphs_or_sites() -> None:
    assert "No collectives found." in Report((), (), ("look here",)).to_html()
    with fake_ranks(4):
        module = torch.nn.parallel.DistributedDataParallel(Net())
        text = dct_compile.explain(module, torch.randn(16, 64), options={"dp_density": 1}).to_html()
    Outline(text)
    assert "No graph was kept." in text
    assert "dp_density=1 keeps everything" in text


def test_human_sizes() -> None:
    assert [page.human(size) for size in (0, 999, 1000, 65536, 632_960, 12_345_678, 5e9, 7.5e12)] == [
        *("0 B", "999 B", "1 kB", "65.5 kB", "633 kB", "12.3 MB", "5 GB", "7,500 GB")
    ]


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_on_its_background(theme: int) -> None:
    """WCAG AA: 4.5 to 1."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colors = {name: luminance(both[theme]) for name, *both in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", CSS)}
    grounds = ("paper", "head", "add", "del", "reads", "collective", "kernel", "mark")
    pairs = [(text, ground) for text in ("ink", "faint", "link") for ground in grounds] + [("kernel-edge", "paper")]
    for text, ground in pairs:
        low, high = sorted((colors[text], colors[ground]))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_the_page_says_what_it_was_made_with(report: Report) -> None:
    text = " ".join(report.to_html(facts={"options": "dp_density=<0.5>"}).split())
    assert "options: <b>dp_density=&lt;0.5&gt;</b>" in text
    assert f"torch: <b>{torch.__version__}</b>" in text
    assert re.search(r"date: <b>20\d\d-\d\d-\d\d</b>", text)


@pytest.mark.parametrize(("seconds", "shown"), [((0.25, 0.5), "<dd>1 s</dd>"), ((None, None), "No link is known")])
def test_the_page_predicts_seconds_where_a_link_is_known(report: Report, seconds: tuple[float | None, float | None], shown: str) -> None:
    own, dense = seconds
    site = replace(report.sites[0], seconds=own, dense_seconds=dense, calls=2)
    assert shown in Report((site,), report.graphs, ()).to_html()


def test_a_wide_drawing_has_the_whole_row(report: Report) -> None:
    outline = Outline(report.to_html())
    widths = [int(value) for tag, key, value in outline.attributes if tag == "svg" and key == "width" and value != "0"]
    wide = [value for _, key, value in outline.attributes if key == "class" and value == "region whole"]
    assert len(wide) == sum(width > 520 for width in widths) >= 1
