"""The page: self-contained, well-formed, every link leads somewhere; in Chromium: it fits, unfolds, filters and turns dark."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import dct_compile
from dct_compile.inspection import fake_ranks
from dct_compile.report import GraphReport, NodeReport, Report, SiteReport, page
from tests.small_models import Layers
from tests.test_inspect import Net

CSS = (Path(page.__file__).parent / "page.css").read_text()
VOID = {"meta", "br", "rect", "path"}
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


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


@pytest.fixture(scope="module")
def report() -> Report:
    """An activation with its backward and a gradient: real graphs, one with nodes that nothing touches."""

    class Deep(Layers):
        def forward(self, x: torch.Tensor) -> Any:
            for _ in range(40):
                x = torch.sin(x)
            return super().forward(x)

    return dct_compile.explain(Deep(exchanged=True), torch.randn(16, 64), options={"data_parallel": True})


@pytest.fixture(scope="module")
def large() -> Report:
    """10,000 nodes, of which every 500th is a collective that was rewritten."""
    before: list[NodeReport] = []
    after: list[NodeReport] = []
    sites: list[SiteReport] = []
    last = "x"
    for position in range(10_000):
        node = NodeReport(
            f"sin_{position}", "aten.sin.default", (last,), (16, 64), "float32", 4096, f"/model.py:{position % 90 + 1}", "", None, False
        )
        if position % 500 == 250:
            number = len(sites)
            gone = replace(node, operator="_c10d_functional.all_to_all_single.default", site=number)
            packed = replace(node, name=f"pack_rows_{number}", operator="dct.pack_rows.default", site=number)
            unpacked = replace(packed, name=f"unpack_rows_{number}", inputs=(packed.name,))
            before.append(gone)
            after += [packed, unpacked]
            kind = "activation" if number % 2 else "embedding"
            site = SiteReport(
                "all_to_all_single", kind, "here", (16, 64), "float32", "compressed", "k of n", 3072, 144, "0", 4, number=number
            )
            sites.append(site)
        else:
            reading = tuple(f"unpack_rows_{len(sites) - 1}" if position % 500 == 251 else name for name in node.inputs)
            before.append(node)
            after.append(replace(node, inputs=reading))
        last = node.name
    return Report(tuple(sites), (GraphReport("graph 0/0", "", "", tuple(before), tuple(after)),), ())


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


LISTEN = "<script>window.failures = []; onerror = error => window.failures.push(String(error));</script>"
PROBE = """
<script>
addEventListener("load", () => {
  const result = { errors: window.failures };
  result.wide = [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".canvas, .code, .skip, thead, svg") && e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => `${e.tagName}.${e.className}`);
  const names = () => new Set([...document.querySelectorAll(".graph .n > b")].map(e => e.textContent)).size;
  const visible = selector => [...document.querySelectorAll(selector)].filter(e => e.offsetParent !== null).length;
  const color = () => getComputedStyle(document.body).backgroundColor;
  result.before = names();
  const gap = document.querySelector(".gap button");
  result.gap = Number(gap.dataset.count);
  gap.click();
  result.after = names();
  for (const button of document.querySelectorAll(".gap button")) while (button.isConnected) button.click();
  result.all = names();
  result.rows = visible(".sites tbody tr");
  const kind = document.querySelector("[name=kind]");
  kind.value = "activation";
  kind.dispatchEvent(new Event("input", { bubbles: true }));
  result.filtered = [visible(".sites tbody tr"), document.getElementById("shown").textContent];
  result.colors = [color()];
  document.getElementById("theme").click();
  result.colors.push(color());
  result.twins = visible(".graph .twin");
  const target = [...document.querySelectorAll(".anchor")].at(-1);
  location.hash = target.id;
  result.reached = target.getBoundingClientRect().top < innerHeight;
  result.keyboard = [...document.querySelectorAll("a[href], button, select, [tabindex]")].every(e => e.tabIndex >= 0);
  const pre = document.createElement("pre");
  pre.id = "result";
  pre.textContent = JSON.stringify(result);
  document.body.append(pre);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the page was not opened in a browser")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (1400, True), (420, False), (420, True)])
@pytest.mark.parametrize("which", ["report", "large"])
def test_in_a_browser(which: str, width: int, dark: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shown: Report = request.getfixturevalue(which)
    text = shown.to_html().replace(
        "<head>", "<head><script>window.failures = []; onerror = e => window.failures.push(String(e));</script>", 1
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run([str(CHROMIUM), *flags], capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result["errors"] == []
    assert result["wide"] == []
    assert result["after"] == result["before"] + min(result["gap"], 300)
    graph = shown.graphs[0]
    everything = {node.name for one in shown.graphs for node in (*one.nodes_before, *one.nodes_after)}
    assert result["all"] == len(everything) >= len(graph.nodes_before)
    assert result["rows"] == len(shown.sites)
    chosen = sum(site.kind == "activation" for site in shown.sites)
    assert result["filtered"] == [chosen, f"{chosen} of {len(shown.sites)} sites"]
    light_dark = ["rgb(255, 255, 255)", "rgb(22, 25, 28)"]
    assert result["colors"] == (light_dark[::-1] if dark else light_dark)
    assert (result["twins"] == 0) == (width < 820), "narrow pages show what stayed once"
    assert result["keyboard"]
    assert result["reached"]
