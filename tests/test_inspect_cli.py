"""``dct inspect``: what it prints and writes, and what it says about a target that cannot be inspected."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from click.testing import CliRunner, Result

from dct_compile.cli.main import main
from dct_compile.cli.targets import MOVIELENS_TABLES
from dct_compile.models.sources import MissingData, movielens
from dct_compile.options import default_options

USERS_FILE = """
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from helper import WIDTH
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, scale=1.0):
        return funcol.all_to_all_single_autograd(self.layer(x) * scale, None, None, dist.group.WORLD).sin()

def one(): return Net(), torch.randn(16, WIDTH)
def several(): return Net(), [torch.randn(16, WIDTH), 2.0]
def named(): return Net(), {"x": torch.randn(16, WIDTH), "scale": 3.0}
def wrapped(): return nn.parallel.DistributedDataParallel(Net()), torch.randn(16, WIDTH)
def raising(): raise ArithmeticError("no luck")
def leaving(): raise SystemExit(3)
def model_alone(): return Net()
def three(): return Net(), 1, 2
def no_model(): return "Net", torch.randn(16, WIDTH)
def wrong_inputs(): return Net(), 3
def wrong_shape(): return Net(), torch.randn(16, 3)
constant = 3
"""


KINDS = {"gradient", "activation", "activation_gradient", "embedding", "embedding_gradient"}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)], prog_name="dct")


def said(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users.py").write_text(USERS_FILE)
    (tmp_path / "helper.py").write_text("WIDTH = 64\n")
    (tmp_path / "broken.py").write_text("import does_not_exist\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def sites(folder: Path, *arguments: object) -> list[dict[str, Any]]:
    """The sites that the JSON file holds."""
    result = invoke(*arguments, "--json", folder / "out.json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["sites"]
    return found


def test_demo_model_shows_all_kinds(tmp_path: Path) -> None:
    result = invoke("dlrm", "--html", tmp_path / "out.html", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("dlrm, compiled for 4 ranks; bytes are sent per rank and call\n")
    for word in (*KINDS, "gather_B", "owner_B", "parallel.py", "per rank and step"):
        assert word in result.output, word
    written = json.loads((tmp_path / "out.json").read_text())
    assert {site["kind"] for site in written["sites"]} == KINDS
    assert written["wire_bytes"] == sum(site["wire_bytes"] for site in written["sites"])
    assert "<!doctype html>" in (tmp_path / "out.html").read_text()
    assert not dist.is_initialized()


@pytest.mark.parametrize(("ranks", "kinds"), [(1, set()), (2, KINDS), (3, {"gradient"})])
def test_demo_model_fits_any_number_of_ranks(ranks: int, kinds: set[str], tmp_path: Path) -> None:
    found = sites(tmp_path, "dlrm", "--ranks", ranks)
    assert {site["kind"] for site in found if site["group_size"] > 1} == kinds


def test_demo_tables_are_those_of_the_demo() -> None:
    try:
        tables = movielens().tables
    except MissingData as error:
        pytest.skip(str(error))
    assert tables == MOVIELENS_TABLES


@pytest.mark.slow
def test_a_thousand_ranks_take_seconds(tmp_path: Path) -> None:
    """In a process of its own, imports included; the limit is twice what two busy cores take."""
    code = "from dct_compile.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "dlrm", "--ranks", "1024"], capture_output=True, text=True, check=False, timeout=40
    )
    assert done.returncode == 0, done.stderr
    assert "dlrm, compiled for 1024 ranks" in done.stdout
    assert "owner, density 0.01" in done.stdout


@pytest.mark.parametrize("function", ["one", "several", "named"])
def test_users_own_model(folder: Path, function: str) -> None:
    found = sites(folder, f"users.py:{function}", "--ranks", 8)
    assert [(site["kind"], site["group_size"]) for site in found] == [("activation", 8), ("activation_gradient", 8)]
    assert found[0]["source"].endswith("users.py:14")


def test_gradients_of_users_own_model(folder: Path) -> None:
    assert "no gradient is in this table" in said(invoke("users.py:one"))
    added = [site for site in sites(folder, "users.py:one", "--options", "data_parallel=true") if site["kind"] == "gradient"]
    wrapped = [site for site in sites(folder, "users.py:wrapped") if site["kind"] == "gradient"]
    assert [site["wire_bytes"] for site in added] == [site["wire_bytes"] for site in wrapped] != []
    result = invoke("users.py:wrapped", "--options", "data_parallel=True")
    assert result.exit_code == 1
    assert "the model is wrapped in DDP: gradients would be averaged twice" in said(result)


def test_options_are_repeated_or_follow_each_other(folder: Path) -> None:
    several = sites(
        folder, "users.py:one", "--options", "mp_density=0.25", "activation_codec=threshold", "data_parallel=true", 'exempt=["*.bias"]'
    )
    repeated = sites(
        folder,
        "users.py:one",
        "--options",
        "mp_density=0.25",
        "--options",
        "activation_codec=threshold",
        "data_parallel=true",
        "--options",
        "exempt=['*.bias']",
    )
    assert several == repeated
    assert several[0]["reason"] == "row threshold, 16 of 64 kept"
    assert several[-1]["reason"].endswith("dense: layer.bias")


def test_help_lists_every_option_with_its_default() -> None:
    text = said(invoke("--help"))
    assert all(f"{name}={'[]' if value == () else value}" in text for name, value in default_options().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["dlmr"],
            "unknown target 'dlmr': expected a model (dlrm, gpt, resnet) or file.py:function, where the function returns (model, inputs)",
        ),
        (["nowhere.py:one"], "there is no file 'nowhere.py': expected"),
        (["users.txt:one"], "'users.txt:one' is not of the form file.py:function"),
        (["users.py:"], "'users.py:' is not of the form file.py:function"),
        (["dlrm", "--ranks", "0"], "0 is not in the range x>=1"),
        (["dlrm", "--ranks", "many"], "'many' is not a valid integer"),
        (["dlrm", "--options", "mp_density"], "'mp_density' is not of the form key=value"),
        (["dlrm", "--options", "mp_density=2"], "option 'mp_density' is 2 (int); allowed is a number in (0, 1]"),
        (["dlrm", "--options", "mp_density=few"], "option 'mp_density' is 'few' (str); allowed is a number in (0, 1]"),
        (["dlrm", "--options", "mp_densty=0.1"], "unknown option 'mp_densty'"),
        (["dlrm", "--options", "mp_density=0.1", "mp_density=0.2"], "'mp_density' is given twice"),
        (["dlrm", "mp_density=0.1"], "unexpected argument 'mp_density=0.1': options of the backend follow --options"),
        (["dlrm", "--html", "nowhere/out.html"], "cannot write nowhere/out.html: there is no folder"),
        (["dlrm", "--html", "/proc/out.html"], "cannot write /proc/out.html: No such file or directory"),
        (["dlrm", "--json", "/proc/out.json"], "cannot write /proc/out.json: No such file or directory"),
        ([], "Missing argument 'TARGET'"),
    ],
)
def test_usage_errors(folder: Path, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in said(result)


@pytest.mark.parametrize("flag", ["--html", "--json"])
def test_an_error_of_writing_names_the_file(folder: Path, flag: str) -> None:
    """As on a full disk, which is not known before the work."""
    result = invoke("users.py:one", flag, "/dev/full")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "Error: cannot write /dev/full: No space left on device"


def test_a_file_that_is_there_is_kept_until_it_is_written(folder: Path) -> None:
    (folder / "out.json").write_text("before")
    assert invoke("users.py:missing", "--json", "out.json", "--html", "out.html").exit_code == 1
    assert (folder / "out.json").read_text() == "before"
    assert not (folder / "out.html").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("users.py:missing", "users.py has no function 'missing'; it needs one without arguments that returns (model, inputs)"),
        ("users.py:constant", "users.py has no function 'constant'"),
        ("users.py:raising", "raising in users.py raised ArithmeticError: no luck"),
        ("users.py:leaving", "leaving in users.py raised SystemExit: 3"),
        ("users.py:model_alone", "model_alone in users.py returned Net; expected (model, inputs)"),
        ("users.py:three", "three in users.py returned a tuple of 3; expected (model, inputs)"),
        ("users.py:no_model", "returned a str as the model; expected a torch.nn.Module"),
        ("users.py:wrong_inputs", "returned inputs of type int; expected a tensor, a tuple or a dict by argument name"),
        ("users.py:wrong_shape", "users.py:wrong_shape could not be compiled: "),
        ("broken.py:one", "broken.py cannot be loaded: ModuleNotFoundError: No module named 'does_not_exist'"),
    ],
)
def test_errors_of_the_target(folder: Path, target: str, message: str) -> None:
    result = invoke(target)
    assert result.exit_code == 1
    assert message in said(result)
    assert not dist.is_initialized()
