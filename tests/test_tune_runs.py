"""``dct tune`` on real ranks: a study of a user's function, and trainings that fail."""

import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dct_compile.cli.main import main

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

USERS_FILE = """
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from dct_compile import tuning

calls = []

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x)

def train(options):
    calls.append(options)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = Net()
    model = torch.compile(nn.parallel.DistributedDataParallel(net), backend="dct", options=options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    data = torch.randn(16, 64)
    for _ in range(3):
        optimizer.zero_grad()
        loss = mse_loss(model(data), -data)
        loss.backward()
        optimizer.step()
    print(f"pid {os.getpid()}, rank {dist.get_rank()} of {dist.get_world_size()}, call {len(calls)}")
    tuning.report(loss=loss.detach(), step_seconds=0.01)
    dist.barrier()
    dist.destroy_process_group()

def failing(options): raise ArithmeticError("no luck")
def hanging(options): time.sleep(300)
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)], prog_name="dct")


def study(folder: Path, trials: int) -> Result:
    own = ("--options", "rank=2", "--link", "10Mbit/s", "--within", "1.0")
    return invoke(f"{folder}/users.py:train", *own, "--trials", trials, "--out", folder / "tune")


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Returns the folder of a study of one trial, its output, and the output of a second run up to two trials."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "users.py").write_text(USERS_FILE)
    results = [study(folder, trials) for trials in (1, 2)]
    assert [result.exit_code for result in results] == [0, 0], [result.output for result in results]
    return folder, results[0].output, results[1].output


def test_it_prints_options_to_paste_and_a_picture(twice: tuple[Path, str, str]) -> None:
    folder, first, _ = twice
    pasted = re.search(r'^torch.compile\(model, backend="dct", options=(.*)\)$', first, re.MULTILINE)
    assert pasted is not None, first
    options = {"link": "10Mbit/s", "rank": 2, "dp_density": 0.01, "dp_value_dtype": "bfloat16"}
    assert pasted[1] == repr(options)
    assert (folder / "tune" / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_dense_sends_all_and_a_trial_less(twice: tuple[Path, str, str]) -> None:
    """Two ranks send each gradient once: 64 x 64 weights and 64 biases of 4 bytes."""
    sent = [int(size.replace(",", "")) for size in re.findall(r"per step, ([\d,]+) bytes", twice[1])]
    assert sent[0] == 4 * (64 * 64 + 64)
    assert sent[1] < sent[0] / 10


def test_a_second_run_adds_the_trials_that_are_missing(twice: tuple[Path, str, str]) -> None:
    _, first, second = twice
    assert re.findall(r"^trial (\d)", first, re.MULTILINE) == ["0"]
    assert re.findall(r"^trial (\d)", second, re.MULTILINE) == ["1"]
    assert re.findall(r"^dense: loss \S+,", first, re.MULTILINE) == re.findall(r"^dense: loss \S+,", second, re.MULTILINE)


def test_trials_share_no_process(twice: tuple[Path, str, str]) -> None:
    logs = [path.read_text() for path in (twice[0] / "tune" / "trials").glob("*/rank-?.log")]
    lines = [line for log in logs for line in log.splitlines() if line.startswith("pid ")]
    assert len(lines) == len(set(lines)) == 6
    assert all(re.fullmatch(r"pid \d+, rank [01] of 2, call 1", line) for line in lines)


def test_a_failure_of_the_function_is_named(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS_FILE)
    result = invoke(f"{tmp_path}/users.py:failing", "--out", tmp_path / "tune")
    assert result.exit_code == 1
    assert "the dense training failed: ArithmeticError: no luck" in " ".join(result.output.split())


def test_a_training_that_hangs_ends_in_time(tmp_path: Path) -> None:
    (tmp_path / "users.py").write_text(USERS_FILE)
    start = time.monotonic()
    result = invoke(f"{tmp_path}/users.py:hanging", "--timeout", 1, "--out", tmp_path / "tune")
    assert "the dense training failed: not done after 1 s" in " ".join(result.output.split())
    assert time.monotonic() - start < 60
