"""The page in Chromium: it fits, unfolds, filters and turns dark."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dct_compile.report import Report
from tests.reports import explained_report, large_report

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
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
@pytest.mark.parametrize("make", [explained_report, large_report])
def test_in_a_browser(make: Callable[[], Report], width: int, dark: bool, tmp_path: Path) -> None:
    shown = make()
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
