"""Hosts with slow links: their rate, the bytes that they count, and that nothing of them is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.slow_hosts import SlowHosts, SlowHostsError, missing

ROOT = Path(__file__).parent.parent
RATE = 100e6
ALL_REDUCES = """
import time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
x = torch.full((250_000,), float(dist.get_rank() + 1))
dist.all_reduce(x.clone())
times = []
for _ in range(5):
    y = x.clone()
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(y)
    times.append(time.perf_counter() - start)
print(min(times), y.unique().tolist())  # other processes make single ones slower, and none faster
"""

lacking = missing()
pytestmark = pytest.mark.skipif(bool(lacking), reason="; ".join(lacking) or "all is there")


def test_an_all_reduce_takes_the_time_of_its_bytes_and_the_host_counts_them() -> None:
    with SlowHosts(2, RATE) as hosts:
        before = hosts.sent_bytes()
        printed = hosts.run([sys.executable, "-c", ALL_REDUCES], timeout_s=120)
        sent = [after - first for after, first in zip(hosts.sent_bytes(), before, strict=True)]
    expected_s = 1e6 * 8 / RATE  # 2 (n - 1) / n of 1 MB
    for line in printed:
        seconds, values = line.split(maxsplit=1)
        assert expected_s / 2 < float(seconds) < 2 * expected_s
        assert values == "[3.0]\n"
    for count in sent:
        assert 6e6 < count < 6.6e6  # six all_reduces, headers included


def test_processes_have_the_variables_of_torchrun_and_see_a_changed_rate() -> None:
    code = "import os; print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'GLOO_SOCKET_IFNAME')))"
    with SlowHosts(3, None) as hosts:
        assert hosts.run([sys.executable, "-c", code], timeout_s=60) == [f"{rank} 3 10.81.0.1 eth0\n" for rank in range(3)]
        assert [_tc(hosts, host) for host in range(3)] == ["noqueue"] * 3
        hosts.set_rate(1e9)
        assert [_tc(hosts, host) for host in range(3)] == ["tbf 1Gbit"] * 3
        hosts.set_rate(10e6)
        assert [_tc(hosts, host) for host in range(3)] == ["tbf 10Mbit"] * 3
        hosts.set_rate(None)
        assert [_tc(hosts, host) for host in range(3)] == ["noqueue"] * 3


def test_a_failing_rank_is_an_error_that_names_it() -> None:
    with SlowHosts(2, None) as hosts, pytest.raises(SlowHostsError, match="has ended with 3 on rank 1"):
        hosts.run([sys.executable, "-c", "import os, sys; sys.exit(3 * int(os.environ['RANK']))"], timeout_s=60)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_a_run_ends(how: signal.Signals) -> None:
    script = """
import signal, time
from benchmarks.slow_hosts import SlowHosts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background inherits that it is ignored
with SlowHosts(2, 1e8) as hosts:
    ranks = hosts.start(["sleep", "1000"])
    print(*(process.pid for process in [*hosts._holders, *ranks]), flush=True)
    time.sleep(1000)
"""
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert run.stdout is not None
    pids = [int(text) for text in run.stdout.readline().split()]
    assert len(pids) == 5
    os.kill(run.pid, how)
    run.wait(timeout=120)
    run.stdout.close()
    deadline = time.monotonic() + 30
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_lives(pid) for pid in pids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None), "hosts is 0, allowed is 1 to 250"),
        ((2, 0.0), "bits_per_s is 0.0, allowed is a number above 0"),
        ((2, None, -1.0), "delay_s is -1.0, allowed is 0 or more"),
    ],
)
def test_wrong_numbers_are_named(arguments: tuple[int, float | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlowHosts(*arguments)


def _tc(hosts: SlowHosts, host: int) -> str:
    command = [*hosts._inside(host), "tc", "qdisc", "show", "dev", "eth0"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return f"tbf {words[words.index('rate') + 1]}" if words[1] == "tbf" else words[1]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
