"""The documentation site: it builds without a warning, so without a dead link, and its pages load nothing from other hosts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

LOADED = re.compile(r"""(?:<(?:script|img|iframe|source)\b[^>]*?\bsrc|<link\b[^>]*?\bhref)=["'](?:https?:)?//[^"']+""")
IMPORTED = re.compile(r"""(?:@import\s+["']|url\(["']?)(?:https?:)?//[^"')]+""")


def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'dct-compile[docs]'")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--builder", "html", "--conf-dir", "docs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, ".", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    pages, styles = list(tmp_path.rglob("*.html")), list(tmp_path.rglob("*.css"))
    assert {"index.html", "README.html"} <= {page.name for page in pages}
    assert [found for page in pages for found in LOADED.findall(page.read_text())] == []
    assert [found for style in styles for found in IMPORTED.findall(style.read_text())] == []
