"""``dct docs`` in a clone; tests/test_packaging.py has it in an installed wheel."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dct_compile.cli import docs
from dct_compile.cli.main import main
from tests.processes import ROOT


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["docs", *arguments])


def test_pages_are_listed_with_their_titles() -> None:
    lines = invoke().stdout.splitlines()
    assert lines[0] == f"Pages in {ROOT / 'docs'}:"
    assert ["howto/fsdp", "FSDP", "and", "HSDP"] in [line.split() for line in lines]
    assert len(lines) == 1 + len(list((ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("page", ["checkpoints", "checkpoints.md", "docs/checkpoints.md"])
def test_a_page_is_printed(page: str) -> None:
    assert invoke(page).stdout == (ROOT / "docs" / "checkpoints.md").read_text()


def test_an_unknown_page_is_named() -> None:
    done = invoke("trubleshooting")
    assert done.exit_code == 2
    assert "there is no page 'trubleshooting': did you mean 'troubleshooting'?" in done.output
    assert "`dct docs` lists them" in invoke("zzzzz").output


def test_missing_pages_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docs, "__file__", str(tmp_path / "site" / "dct_compile" / "cli" / "docs.py"))
    monkeypatch.setattr(docs, "files", lambda name: None)
    done = invoke()
    assert done.exit_code == 1
    assert "the pages are not installed: install the package from its wheel" in done.output
