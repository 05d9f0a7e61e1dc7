"""``dct options``, ``dct env`` and ``dct --version``; targets and options in any order; progress that is piped."""

import re
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from dct_compile.cli import progress
from dct_compile.cli.asked import asked_for
from dct_compile.cli.main import main
from dct_compile.cli.options import as_markdown
from dct_compile.cli.progress import Progress
from dct_compile.options import default_options, described
from tests.processes import ROOT, run_python

ROW = re.compile(r"^\| (`\w+`) \| (`.*?`) \| (.*) \|$", re.MULTILINE)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="dct")


def said(result: Result) -> str:
    return " ".join(result.output.split())


def as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def test_readme_has_the_table_that_the_options_make() -> None:
    """The order of the rows, and a capital at the start of a meaning, are the README's own."""
    written = (ROOT / "README.md").read_text(encoding="utf-8").split("## Options", 1)[1].split("\n## ", 1)[0]
    rows = {(name, default, as_sentence(meaning)) for name, default, meaning in ROW.findall(written)}
    assert rows == set(ROW.findall(as_markdown(list(described()))))


def test_every_option_has_default_allowed_values_and_meaning() -> None:
    text = said(invoke("options"))
    for option in described():
        assert f"{option.name} = {option.default} allowed: {' '.join(option.allowed.split())}" in text
        assert option.meaning.endswith(".")
    assert [option.name for option in described()] == list(default_options())


def test_one_option_is_shown_without_marks() -> None:
    assert said(invoke("options", "inline_kernels")) == (
        "inline_kernels = False allowed: True or False On CUDA: Inductor sees the kernel launches instead of opaque operators"
        " (docs/kernels.md#registration)."
    )


def test_unknown_option_is_an_error() -> None:
    result = invoke("options", "dp_densty")
    assert result.exit_code == 2
    assert "there is no option 'dp_densty': did you mean 'dp_density'?" in said(result)


def test_options_and_version_do_not_import_torch() -> None:
    code = "import sys; from dct_compile.cli.main import main; main(sys.argv[1:], standalone_mode=False); assert 'torch' not in sys.modules"
    for arguments in (["options"], ["options", "--markdown"], ["--version"]):
        run_python(code, *arguments)


def test_version_is_that_of_the_package() -> None:
    assert invoke("--version").output == f"dct-compile {version('dct-compile')}\n"


def test_env_names_what_a_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    output = invoke("env").output
    for title in ("dct-compile", "Python", "processor", "C++ compiler", "C++ kernels", "CUDA devices", "process groups"):
        assert re.search(rf"^{re.escape(title)}: +\S", output, re.MULTILINE), output
    assert f"torch {version('torch')}" in output
    assert "NCCL_DEBUG=INFO\n" in output
    assert "hidden" not in output


def test_env_survives_a_broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    result = invoke("env")
    assert result.exit_code == 0
    assert re.search(r"^C\+\+ compiler: +error: FileNotFoundError", result.output, re.MULTILINE)


@pytest.mark.parametrize("words", [("gpt", "b=2"), ("b=2", "gpt")])
def test_target_and_options_in_any_order(words: tuple[str, ...]) -> None:
    assert asked_for(words, ["a=1"]) == ("gpt", ["a=1", "b=2"])


def test_a_path_may_have_an_equals_sign() -> None:
    assert asked_for(["runs/lr=1/net.py:make"], []) == ("runs/lr=1/net.py:make", [])


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["gpt", "dlrm"], [], "unexpected argument 'dlrm' beside the target 'gpt'"),
        (["a=1"], ["b=2"], "Missing argument 'TARGET'"),
        (["gpt", "a=1"], [], "unexpected argument 'a=1': options of the backend follow --options"),
    ],
)
def test_wrong_arguments_are_named(words: list[str], options: list[str], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        asked_for(words, options)


def test_target_may_follow_the_options(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import torch\ndef make(): return torch.nn.Linear(4, 4), torch.randn(2, 4)\n")
    result = invoke("inspect", "--options", "mp_density=0.25", "min_numel=1", f"{tmp_path}/net.py:make")
    assert result.exit_code == 0, result.output


def test_piped_progress_begins_at_once_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(30, "dct, seed 0") as shown:
        assert capsys.readouterr().err == "dct, seed 0: 0 of 30, 0 s\n"
        for _ in range(25):
            now[0] += 1
            shown.step({"loss": "0.5000"})
    assert capsys.readouterr().err.splitlines() == ["dct, seed 0: 10 of 30, 10 s, loss 0.5000", "dct, seed 0: 20 of 30, 20 s, loss 0.5000"]


def test_other_ranks_show_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(30, "dct, seed 0", shown=False) as shown:
        shown.step()
    assert capsys.readouterr().err == ""
