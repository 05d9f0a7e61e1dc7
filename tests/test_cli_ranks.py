"""Ranks that a command starts end with it: at Ctrl-C, after a time, and when it is killed."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from dct_compile.cli.ranks import run_ranks
from tests.processes import ROOT

pytestmark = pytest.mark.distributed

COMMAND = """
import sys, click
from dct_compile.cli.ranks import run_ranks
from tests.test_cli_ranks import wait
if __name__ == "__main__":
    folder = sys.argv.pop()
    click.command()(lambda: run_ranks(wait, (folder,), 2))()
"""


def wait(rank: int, folder: str) -> None:
    """Says that it runs, and goes on for longer than any test. Ctrl-C must not reach it: its imports would end with a traceback."""
    lock = multiprocessing.get_context("spawn").Lock()  # the tracker finds it when the rank is killed
    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    Path(folder, f"{rank}-{os.getpid()}").touch()
    time.sleep(300)
    del lock


def fail(rank: int) -> None:
    if rank == 1:
        raise ArithmeticError("no luck")
    time.sleep(300)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def stopped_by(number: signal.Signals, folder: Path, is_group: bool) -> tuple[int, str, float]:
    """Starts two ranks, sends them a signal when both run, and returns exit status, output, and the seconds until no rank was left."""
    (folder / "command.py").write_text(COMMAND)
    own = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "command.py"), str(folder)]
    process = subprocess.Popen(
        command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, restore_signals=True
    )
    end = time.monotonic() + 120
    while len(pids := [int(path.name[2:]) for path in folder.glob("?-*")]) < 2:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    start = time.monotonic()
    (os.killpg if is_group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    while any(map(is_running, pids)):
        assert time.monotonic() < start + 60
        time.sleep(0.01)
    return process.returncode, output, time.monotonic() - start


@pytest.mark.parametrize("is_group", [True, False], ids=["terminal", "command alone"])
def test_ctrl_c_ends_all_ranks_without_a_word_of_theirs(tmp_path: Path, is_group: bool) -> None:
    status, output, seconds = stopped_by(signal.SIGINT, tmp_path, is_group)
    assert (status, output.strip()) == (1, "Aborted!")
    assert seconds < 30, "a rank would sleep for minutes"


def test_ranks_of_a_killed_command_end(tmp_path: Path) -> None:
    status, output, _ = stopped_by(signal.SIGKILL, tmp_path, False)
    assert (status, output) == (-signal.SIGKILL, "")


def test_a_failure_of_one_rank_ends_the_others() -> None:
    with pytest.raises(click.ClickException, match=re.compile("Process 1 terminated.*ArithmeticError: no luck", re.DOTALL)):
        run_ranks(fail, (), 2)


def test_ranks_that_take_too_long_are_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(click.ClickException, match=re.escape("not done after 0.5 s")):
        run_ranks(wait, (str(tmp_path),), 2, timeout_s=0.5)
    assert time.monotonic() - start < 30
