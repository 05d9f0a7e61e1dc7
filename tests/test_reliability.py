"""The table of docs/reliability.md is the script's, and the script notices an outcome that differs."""

import csv
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.processes import ROOT, run_python

SCRIPT = ROOT / "benchmarks" / "reliability.py"
RESULTS = ROOT / "benchmarks" / "results" / "reliability.csv"
PATHS = f"{ROOT}:{SCRIPT.parent}"
QUICK = "kill -9 in an exchange;damaged or foreign"
"""Faults that take seconds."""


@cache
def faults() -> list[str]:
    """Returns the names of the script's rows."""
    return run_python("from reliability import ROWS; print(*(row.fault for row in ROWS), sep='\\n')", PYTHONPATH=PATHS).stdout.splitlines()


def results() -> list[dict[str, str]]:
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_results_are_those_of_all_rows() -> None:
    assert [line["fault"] for line in results()] == faults()


def test_all_outcomes_are_as_expected() -> None:
    assert [line["fault"] for line in results() if line["got"].startswith("NOT AS EXPECTED")] == []


def test_the_table_is_made_of_the_results() -> None:
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    assert head == ["fault", "how provoked", "expected", "got", "ranks"]
    assert rows == [[line[name] for name in head] for line in results()]


def test_the_page_says_where_and_when() -> None:
    runs = {", ".join(line[name] for name in ("machine", "versions", "date")) for line in results()}
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert all(f" rows: {run}.\n" in page for run in runs)


DIFFERING = """
from pathlib import Path
from faults.row import Row, check
from reliability import provoke
for holds in (True, False):
    print(provoke(Row("a fault", "provoked", "an error", 1, lambda folder: check(holds, "no error") or "so"))["got"])
"""


def test_an_outcome_that_differs_is_said() -> None:
    assert run_python(DIFFERING, PYTHONPATH=PATHS).stdout.splitlines() == ["so", "NOT AS EXPECTED: UnexpectedError: no error"]


@pytest.mark.distributed
def test_faults_that_are_provoked_quickly(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- made by benchmarks/reliability.py -->\n\n<!-- end -->\n")
    command = [sys.executable, str(SCRIPT), "--only", QUICK, "--results", str(tmp_path / "results.csv"), "--page", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(page.read_text().splitlines()) == 10
    assert "| so in 5 of 5 ways" in page.read_text()
