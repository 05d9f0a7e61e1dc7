"""Much of the same: process groups made again and again, threads, and a long training."""

import gc
import os
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

import dct_compile
from faults.ranks import LIMIT_S, TIMEOUT_S, Rank, results, run
from faults.row import Row, check
from faults.training import Training, batch

WORLDS = 50
LOOK_STEPS = 250
"""Steps of a soak between two looks at what a process holds."""
SLOWEST_S = 0.1
"""The longest that a step of a soak may take, on average."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
GROWTH_BYTES = 8 * 2**20
"""Growth of memory that counts as flat: allocators keep what they once had."""


def held() -> tuple[int, int, int]:
    """Returns the descriptors, the threads and the bytes of memory of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident


def settled() -> tuple[int, int, int]:
    """Returns :func:`held` when descriptors and threads no longer change: threads end by themselves."""
    seen = [held()]
    while len(seen) < 4 or len({item[:2] for item in seen[-4:]}) > 1:
        time.sleep(0.1)
        seen.append(held())
    return seen[-1]


def worlds(rank: Rank) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Destroys and makes the process group again and again, each time with a new model that trains for a step."""
    base = _get_default_store()
    seen = []
    for world in range(WORLDS):
        dist.barrier()  # the other rank may still connect
        dist.destroy_process_group()
        torch._dynamo.reset()
        gc.collect()
        store = PrefixStore(f"world {world}", base)
        dist.init_process_group("gloo", store=store, rank=rank.number, world_size=rank.ranks, timeout=timedelta(seconds=TIMEOUT_S))
        Training("DDP(compile)").steps(rank.number, range(1))
        seen += [settled()] if world in (4, WORLDS - 1) else []
    return seen[0], seen[1]


def many_worlds(folder: Path) -> str:
    growth = 0
    for first, last in results(run(2, worlds)):
        check(first[:2] == last[:2], f"descriptors and threads: {first[:2]}, then {last[:2]}")
        growth = max(growth, last[2] - first[2])
    return f"so; memory grew by {growth / 2**20:.1f} MiB"


def two_threads(rank: Rank) -> tuple[list[str], list[str]]:
    """Trains two models at once, each over a group of its own and started in another order on each rank; then one after the other."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]

    def trainings() -> list[Training]:
        made = [Training("DDP(compile)", group=group, width=width) for group, width in zip(groups, (64, 96), strict=True)]
        for training in made:
            training.steps(rank.number, range(1))  # two threads that compile at once can block each other inside of torch
        return made

    at_once = trainings()
    threads = [threading.Thread(target=training.steps, args=(rank.number, range(1, 20)), daemon=True) for training in at_once]
    for thread in threads if rank.number == 0 else reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    alone = trainings()
    for training in alone:
        training.steps(rank.number, range(1, 20))
    return [training.digest() for training in at_once], [training.digest() for training in alone]


def threads_alike(folder: Path) -> str:
    (at_once, alone), (others, _) = results(run(2, two_threads))
    check(at_once == alone == others, f"{at_once}, {others}, {alone}")
    return "so"


def soaked(rank: Rank, way: str, steps: int) -> dict[str, Any]:
    """Trains for ``steps`` under an audit, and looks every LOOK_STEPS at what the process holds."""
    training, seen = Training(way, {"audit": True}), []
    with dct_compile.audit(training.model) as audit:
        for step in range(steps):
            training.loss(batch(rank.number, step)).backward()
            training.apply()
            seen += [held()] if (step + 1) % LOOK_STEPS == 0 else []
        found = audit.check()
    return {"error": found.error, "early": seen[len(seen) // 4], "late": seen[-1], "digest": training.digest()}


def soak(ways: tuple[str, ...], steps: int, folder: Path) -> str:
    worst, growth = 0.0, 0
    for way in ways:
        first, second = results(run(2, soaked, way, steps, limit_s=LIMIT_S + steps * SLOWEST_S))
        check(first["digest"] == second["digest"], f"{way}: other parameters on each rank")
        for found in (first, second):
            early, late = found["early"], found["late"]
            check(early[:2] == late[:2], f"{way}: descriptors and threads: {early[:2]}, then {late[:2]}")
            check(late[2] - early[2] < GROWTH_BYTES, f"{way}: memory grew by {(late[2] - early[2]) / 2**20:.1f} MiB")
            growth, worst = max(growth, late[2] - early[2]), max(worst, found["error"])
    return f"so in {len(ways) * steps:,} steps; memory grew by {growth / 2**20:.1f} MiB, the audit differs by {worst:.0e} of the gradients"


ROWS = (
    Row(
        f"{WORLDS} x destroy and init of the process group",
        "each time a new compiled model trains for a step",
        "as many descriptors and threads at the end as after the fifth",
        2,
        many_worlds,
    ),
    Row(
        "two trainings in two threads",
        "a process group each, started in another order on each rank",
        "the parameters of one training after the other, bit for bit",
        2,
        threads_alike,
    ),
)


def soak_row(total: int) -> Row:
    """Returns the row of a soak that has ``total`` steps or a few more, the same number in each way."""
    ways = ("compile(DDP)", "data_parallel", "arrival=late")
    steps = -(-total // len(ways))
    return Row(
        "a soak",
        f"a tiny model for {steps:,} steps each: {', '.join(ways)}",
        f"descriptors and threads stay as they are, memory grows by less than {GROWTH_BYTES >> 20} MiB, the audit is exact to rounding",
        2,
        partial(soak, ways, steps),
    )
