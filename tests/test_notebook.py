"""The notebook runs from its first cell to its last, and shows what it says."""

import os
from typing import Any

import pytest

from tests.processes import ROOT

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make setup")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: make setup")
pytestmark = pytest.mark.distributed


def shown(cell: Any) -> str:
    """Returns what a cell has printed, and its result as text."""
    parts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(parts)


def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    _, explained, graph, fast, trained = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "compressed" in shown(explained)
    assert any("text/html" in output.get("data", {}) for output in explained.outputs)
    assert "torch.ops.dct.threshold_pack" in shown(graph)
    assert "dense takes" in shown(fast)
    assert "on the wire" in shown(trained)


def test_the_tour_is_stored_without_results() -> None:
    """They would be those of another machine."""
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
