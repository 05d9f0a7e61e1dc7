"""Real processes as ranks of a gloo group, some of which fail.

They are forked from a process that has imported everything, so that a row does not wait for imports. The store lives in the parent: no rank
takes it along when it dies.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

import dct_compile
from dct_compile.runtime import RUNTIME

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 240.0
"""The longest that a group of ranks may take, if nothing else is said."""
TIMEOUT_S = 60.0
"""The timeout of a process group: an error that comes sooner was not waited for."""


@dataclass
class Rank:
    """The process that calls it. ``number`` of ``ranks``. ``connection``: to the parent."""

    number: int
    ranks: int
    connection: Connection

    def strike(self, number: int | None = None) -> None:
        """Notes the time of a fault, and sends signal ``number`` to this process."""
        self.connection.send(("struck", time.monotonic()))
        if number is not None:
            os.kill(os.getpid(), number)


@dataclass
class End:
    """How a rank has ended. ``result``: of its function. ``error``: the text of its exception. ``code``: its exit code.

    ``struck``, ``ended``: when it made its fault, and when its function returned or raised, in seconds of the monotonic clock.
    """

    result: Any = None
    error: str = ""
    code: int | None = None
    struck: float = 0.0
    ended: float = 0.0


def run(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = TIMEOUT_S,
    awaited: tuple[int, ...] | None = None,
    limit_s: float = LIMIT_S,
) -> list[End]:
    """Calls ``function(rank, *arguments)`` on each of ``ranks`` new processes, in a group of theirs.

    Args:
        ranks: How many.
        function: Can be pickled, as its arguments and results.
        arguments: Of the function, after the :class:`Rank`.
        timeout_s: The timeout of the group.
        awaited: The ranks whose end is waited for, all by default. The others are killed then.
        limit_s: The longest that they may take. They are killed then.

    Returns:
        How each rank has ended, in order. One that was killed or did not end in time has no result and no error.
    """
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    context.set_forkserver_preload(["faults.preloaded"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends, pipes, processes = [End() for _ in range(ranks)], {}, []
    for number in range(ranks):
        here, there = context.Pipe()
        process = context.Process(target=_rank, args=(number, ranks, there, store.port, timeout_s, function, arguments), daemon=True)
        process.start()
        there.close()
        pipes[here] = number
        processes.append(process)
    waiting, deadline = set(range(ranks) if awaited is None else awaited), time.monotonic() + limit_s
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(pipes), left):
            assert isinstance(pipe, Connection)
            number = pipes[pipe]
            try:
                kind, *values = pipe.recv()
            except EOFError:
                del pipes[pipe]
                waiting.discard(number)
                continue
            if kind == "struck":
                ends[number].struck = values[0]
            else:
                ends[number].ended, ends[number].result, ends[number].error = values
    for process, end, number in zip(processes, ends, range(ranks), strict=True):
        if number in waiting or (awaited is not None and number not in awaited):
            process.kill()
        process.join()
        end.code = process.exitcode
    return ends


def caches_in(folder: Path, kernels: Path) -> dict[str, str]:
    """Returns the environment in which the kernels' cache is ``kernels``, and all others are in ``folder``, which there is."""
    # Kernels that cannot be kept in their own cache lie among temporary files.
    return {"DCT_COMPILE_CACHE_DIR": str(kernels), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TMPDIR": str(folder)}


def run_each(ranks: int, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Calls ``function(rank, *case)`` for each case on the same ``ranks`` processes. Returns the results of all ranks, for each case.

    Raises:
        RuntimeError: A rank has failed.
    """
    return [list(found) for found in zip(*results(run(ranks, _each, function, cases)), strict=True)]


def _each(rank: Rank, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    found = []
    for case in cases:
        torch._dynamo.reset()
        dct_compile.reset_report()
        dist.barrier()  # no rank begins while another one is in the case before
        found.append(function(rank, *case))
    return found


def results(ends: list[End]) -> list[Any]:
    """Returns the results of all ranks.

    Raises:
        RuntimeError: A rank has failed.
    """
    for number, end in enumerate(ends):
        if end.error or end.code != 0:
            raise RuntimeError(f"rank {number} ended with code {end.code}: {end.error}")
    return [end.result for end in ends]


def _rank(
    number: int, ranks: int, connection: Connection, port: int, timeout_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    torch.set_num_threads(1)
    RUNTIME.links.auto = None  # all ranks are on one machine, where nothing would be compressed
    torch._inductor.config.compile_threads = 1
    # Graphs and messages are tested, not Inductor's C++: without it a graph compiles in one second instead of ten.
    torch._inductor.config.fallback_by_default = True
    result, error = None, ""
    try:
        store = TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=number, world_size=ranks, timeout=timedelta(seconds=timeout_s))
        result = function(Rank(number, ranks, connection), *arguments)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    connection.send(("ended", time.monotonic(), result, error))
    dct_compile.reset_report()
    if dist.is_initialized() and not error:
        dist.barrier()
        dist.destroy_process_group()
