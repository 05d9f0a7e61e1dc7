"""docs/troubleshooting.md explains every reason and note that there is."""

import ast
import re
from pathlib import Path

import pytest

from dct_compile.reasons import BreakAdvice, Note, Reason, Unseen
from dct_compile.report import GRADIENTS_OUTSIDE, NOT_REACHED, NOTHING_COMPILED

ROOT = Path(__file__).parent.parent
FIRST_CELLS = [
    line.split("|")[1].strip().replace("`", "") for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines() if "|" in line
]


def as_written(template: str) -> str:
    """A template's fields as the page writes them: ``{op!r}`` is ``<op>``."""
    return re.sub(r"\{(\w+)[^}]*\}", r"<\1>", template)


@pytest.mark.parametrize("text", [*Reason, *Note, NOTHING_COMPILED, NOT_REACHED, GRADIENTS_OUTSIDE], ids=lambda text: text[:40])
def test_every_reason_and_note_has_a_row(text: str) -> None:
    assert FIRST_CELLS.count(as_written(text)) == 1


@pytest.mark.parametrize("text", [*BreakAdvice, *Unseen], ids=lambda text: text[:40])
def test_every_part_of_a_note_is_told(text: str) -> None:
    assert (ROOT / "docs" / "troubleshooting.md").read_text().count(text) == 1


SCHEMES = [
    f"dct_compile/schemes/{name}.py"
    for name in ("powersgd", "quantized_rows", "quantized_shards", "random_k", "row_threshold", "rows", "threshold")
]


@pytest.mark.parametrize(
    "file",
    [
        "passes/plan.py",
        "dct_compile/integrations/ddp.py",
        "dct_compile/integrations/ddp_report.py",
        "dct_compile/integrations/fsdp_plan.py",
        "dct_compile/integrations/pipeline_plan.py",
        "dct_compile/schemes/members.py",
        *SCHEMES,
    ],
)
def test_reasons_come_from_the_table(file: str) -> None:
    """A text of its own, given as a reason or returned as one, would be missing in the page."""
    texts: list[ast.expr | None] = []
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            position = {"dense": 1, "Decision": 2, "_site": 5, "Declined": 0}.get(node.func.id)
            texts += [] if position is None else [node.args[position]]
        elif isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "str | None":
            texts += [found.value for found in ast.walk(node) if isinstance(found, ast.Return)]
    assert texts
    assert [ast.unparse(text) for text in texts if isinstance(text, ast.JoinedStr | ast.Constant) and ast.unparse(text) != "None"] == []
