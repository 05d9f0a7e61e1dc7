"""The commands ``dct advise`` and ``dct link``: what they print and write, and what they say about wrong arguments."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from click.testing import CliRunner, Result
from torch import nn

from dct_compile.cli.advise_numbers import prepare
from dct_compile.cli.asked import TargetError
from dct_compile.cli.link import told
from dct_compile.cli.main import main
from dct_compile.cli.parsing import parse_value
from dct_compile.cli.targets import Target
from dct_compile.link import Link, parse
from tests.rank_pool import Ranks

USERS_FILE = """
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        return funcol.all_to_all_single_autograd(self.layer(x), None, None, dist.group.WORLD).sin()

def wrapped(): return nn.parallel.DistributedDataParallel(Net()), torch.randn(16, 256)
"""


class Exchanging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return funcol.all_to_all_single_autograd(self.layer(x), None, None, dist.group.WORLD).sin()


def test_exchanges_between_real_ranks_are_not_timed(group_of_one: dist.ProcessGroup) -> None:
    with pytest.raises(TargetError, match=r"the model exchanges activations, .* give --compute"):
        prepare(Target(Exchanging(), (torch.randn(2, 64),)), {}, None, Link(1.25e8), "net", is_measured=False)
    with pytest.raises(TargetError, match="cannot be timed: no result of the model has a gradient"):
        prepare(Target(lambda x: x.sum(), (torch.ones(2),)), {}, None, Link(1.25e8), "function", is_measured=False)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="dct")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "users.py").write_text(USERS_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_command_says_what_inspection_says(folder: Path) -> None:
    arguments = ("users.py:wrapped", "--compute", "0.001", "--link", "10Mbit/s", "--scale", "--json", "out.json", "--picture", "out.png")
    result = invoke("advise", *arguments)
    assert result.exit_code == 0, result.output
    assert "users.py:wrapped, 4 ranks" in result.output
    assert "link: 10 Mbit/s, 50 us per hop, assumed\ncomputation: 1 ms per step, as given" in result.output
    assert "advice: backend=\"dct\", options={'link': '10Mbit/s'}" in result.output
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    told_ = json.loads((folder / "out.json").read_text())
    assert invoke("inspect", "users.py:wrapped", "--options", "link=null", "--json", "sites.json").exit_code == 0
    report = json.loads((folder / "sites.json").read_text())
    for method, total in (("dense", report["dense_bytes"]), ("dct", report["wire_bytes"])):
        assert sum(kind[method]["bytes"] for kind in told_["traffic"].values()) == total
    rows = told_["traffic"]["activations and embeddings"]
    # Forward and backward: three quarters of 16 x 256 float32 leave a rank, in one hop.
    assert rows["dense"] == {"messages": 2, "bytes": 2 * 12288, "seconds": pytest.approx(2 * (12288 / 1.25e6 + 50e-6))}
    assert rows["dct"]["bytes"] < rows["dense"]["bytes"] / 3.9
    gradients = told_["traffic"]["gradients"]["dense"]
    assert gradients["bytes"] == 2 * 3 * 4 * (256 * 256 + 256) // 4
    assert told_["step_s"]["dense"] == pytest.approx(0.001 + rows["dense"]["seconds"] + gradients["seconds"])
    assert list(told_["scale"]) == [str(2**power) for power in range(1, 11)]
    assert told_["scale"]["4"]["dense"] == gradients


def test_command_advises_dense_on_a_fast_link(folder: Path) -> None:
    result = invoke(
        "advise", "users.py:wrapped", "--compute", 0.001, "--link", '{"bytes_per_s": 5e10, "latency_s": 1e-6}', "--json", "out.json"
    )
    assert result.exit_code == 0, result.output
    assert "advice: leave it dense. " in result.output
    told_ = json.loads((folder / "out.json").read_text())
    assert told_["options"] is None
    assert told_["state_bytes"] == {}
    assert told_["step_s"]["dct"] == told_["step_s"]["dense"]
    assert 0 < told_["crossing_bytes_per_s"]["gradients"] < 5e10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link", "fast"], "--link 'fast' is neither a rate such as 1Gbit/s"),
        (["--link", '{"latency_s": 1e-5}'], "nor a mapping such as"),
        (["--ranks", "1"], "1 is not in the range x>=2"),
        (["--compute", "0"], "0.0 is not in the range x>0"),
        (["--compute", "nan"], "Invalid value for '--compute': nan is not a finite number"),
        (["--compute", "inf"], "Invalid value for '--compute': inf is not a finite number"),
        (["--options", "link=1Gbit/s"], "the link is said by --link, not by option link"),
        (["--options", "dp_densty=1"], "unknown option 'dp_densty'"),
        (["--picture", "missing/out.png"], "there is no folder"),
        (["--picture", "/proc/out.png"], "cannot write /proc/out.png: No such file or directory"),
        (["--json", "/proc/out.json"], "cannot write /proc/out.json: No such file or directory"),
        (["dp_density=1"], "options of the backend follow --options"),
    ],
)
def test_usage_errors(folder: Path, arguments: list[str], words: str) -> None:
    result = invoke("advise", "users.py:wrapped", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_ranks_of_the_launcher_cannot_be_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = invoke("advise", "users.py:wrapped", "--ranks", 4)
    assert result.exit_code == 2
    assert "--ranks 4, but torchrun has started 2 ranks" in result.output


def test_link_needs_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("link")
    assert result.exit_code == 2
    assert "there is no RANK in the environment" in result.output
    for host in (0, 1):
        assert (
            f"--nnodes 2 --nproc-per-node 1 --node-rank {host} --master-addr HOST0 --master-port 29500 --no-python dct link"
            in result.output
        )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = invoke("link")
    assert alone.exit_code == 1
    assert "one rank alone has no link" in alone.output


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x' in the environment, which is not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, which is not a number"),
        ({"RANK": "2"}, "RANK is 2 in the environment, and WORLD_SIZE 2"),
        ({"MASTER_ADDR": ""}, "there is no MASTER_ADDR in the environment"),
        ({"MASTER_ADDR": "localhost"}, "there is no MASTER_PORT in the environment"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT is 'http' in the environment, which is not a number"),
    ],
)
@pytest.mark.parametrize("command", [("link",), ("advise", "users.py:wrapped", "--compute", "1")], ids=lambda words: words[0])
def test_what_torchrun_has_not_written_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], variables: dict[str, str], words: str
) -> None:
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | variables).items():
        monkeypatch.setenv(name, value)
    result = invoke(*command)
    assert result.exit_code == 2
    assert f"{words}: start the command with torchrun, which sets RANK, WORLD_SIZE" in " ".join(result.output.split())


def test_an_error_of_writing_names_the_file(folder: Path) -> None:
    """As on a full disk, which is not known before the work."""
    result = invoke("advise", "users.py:wrapped", "--compute", "1", "--json", "/dev/full")
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "Error: cannot write /dev/full: No space left on device"


def _told(rank: int, ranks: int) -> list[str]:
    assert dist.group.WORLD is not None
    return told(dist.group.WORLD)


@pytest.mark.distributed
def test_link_is_measured_alike_on_all_ranks(ranks2: Ranks) -> None:
    first, second = ranks2(_told)
    assert first == second
    assert first[0] == "link between 2 ranks, measured with all_gather over gloo"
    assert "All ranks are on one machine" in first[-2]
    name, _, value = first[-1].strip().partition("=")
    found = parse(parse_value(value))
    assert name == "link"
    assert found is not None
    assert math.isfinite(found.bytes_per_s)
    assert found.bytes_per_s > 1e5
