"""The training report: its verdict, its pictures in words, and its layout on wide and narrow pages."""

import html
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dct_compile.cli.captions import alternatives, verdict
from dct_compile.cli.plots import draw
from dct_compile.cli.present import present
from dct_compile.cli.results import BackendResult, Results
from tests.test_cli_train_numbers import _results as two_backends

CHROMIUM = shutil.which("chromium")
PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")]
    .filter(e => !e.closest(".scroll, thead") && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const locked = [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0).length;
  document.title = `wide ${wide.length}, locked ${locked}`;
});</script>"""


def with_losses(dense: Sequence[float], dct: Sequence[float]) -> Results:
    """Returns results whose test log-losses are those given, one for each seed."""
    results = two_backends(len(dense))
    backends: list[BackendResult] = []
    for result, losses in zip(results.backends, (dense, dct), strict=True):
        runs = [replace(run, metrics={**run.metrics, "log_loss": loss}) for run, loss in zip(result.runs, losses, strict=True)]
        backends.append(replace(result, runs=runs))
    return replace(results, backends=backends)


@pytest.mark.parametrize(
    ("dense", "dct", "said"),
    [
        ((0.5, 0.6), (0.51, 0.61), "its test log-loss is 0.0100 higher, which is within the spread of dense over 2 seeds (0.0707)"),
        ((0.5, 0.5), (0.49, 0.49), "its test log-loss is 0.0100 lower, which is beyond the spread of dense over 2 seeds (0.0000)"),
        ((0.5, 0.5), (0.5, 0.5), "its test log-loss is the same, which is within the spread"),
        ((0.5,), (0.6,), "its test log-loss is 0.1000 higher, with one seed and so no spread to judge it by"),
    ],
)
def test_the_verdict_compares_the_loss_with_the_spread(dense: Sequence[float], dct: Sequence[float], said: str) -> None:
    sentence = verdict(with_losses(dense, dct))
    assert sentence.startswith("dct sends 2.9 times fewer bytes than dense; ")
    assert said in sentence
    assert sentence.endswith("; a step takes 200 ms here instead of 200 ms.")


def test_the_verdict_says_what_there_is_nothing_to_compare_with() -> None:
    both = two_backends()
    assert verdict(two_backends(with_dct=False)) == "Nothing is compared: only dense was trained."
    assert verdict(replace(both, backends=both.backends[1:])) == "Nothing is compared: dense was not trained."


@pytest.mark.parametrize("with_dct", [True, False])
def test_every_picture_has_a_text_of_what_it_shows(tmp_path: Path, with_dct: bool) -> None:
    results = two_backends(with_dct=with_dct)
    results.save(tmp_path)
    present(tmp_path)
    shown = [html.unescape(text) for text in re.findall(r'<img [^>]*alt="([^"]*)"', (tmp_path / "report.html").read_text())]
    assert shown == [alternatives(results)[name] for name in draw(results, dark=False)]
    assert shown[0].startswith("Training loss over 3 steps: dense ends at 0.600")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: the report was not opened in a browser")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_report_fits_the_page(tmp_path: Path, width: int) -> None:
    two_backends().save(tmp_path)
    present(tmp_path)
    page = tmp_path / "report.html"
    page.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]
    done = subprocess.run([str(CHROMIUM), *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=60)
    assert "<title>wide 0, locked 0</title>" in done.stdout
