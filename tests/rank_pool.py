"""Gloo ranks that live on between tests: each is a process of its own, and runs one function after another."""

import faulthandler
import gc
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Self

import torch
import torch._inductor.config
import torch.distributed as dist
import torch.multiprocessing as mp

from dct_compile.runtime import RUNTIME, Runtime

TIMEOUT_S = 150
GROUP_TIMEOUT = timedelta(seconds=60)
"""A collective that some rank never joins fails after this, instead of gloo's half an hour."""
GRACE_S = 20
"""After the failure of one rank, the others have this long to report theirs."""

Ranks = Callable[..., list[Any]]
"""``ranks(function, *args)``: calls ``function(rank, world_size, *args)`` on every rank and returns the results in order of rank."""


@dataclass(frozen=True)
class Call:
    """One rank's part in a call. ``payload``: the pickled function and its arguments. ``name``: keys of the store begin with it."""

    rank: int
    world_size: int
    port: int
    name: str
    timeout_s: float
    payload: bytes


class RankPool:
    """Starts ranks when they are first needed, and again after a call that failed.

    Args:
        timeout_s: seconds after which a call counts as hanging.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        # The store lives here: a free port that is only looked up could be taken by somebody else before rank 0 listens on it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks: list[tuple[SpawnProcess, Connection]] = []
        self._calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``function(rank, world_size, *args)`` on every rank, inside a process group of their own.

        Args:
            world_size: the number of ranks.
            function: must be importable (top level of a test module). It catches the errors that it expects.
            args: must be picklable, as must the result.

        Returns:
            The results in order of rank.

        Raises:
            AssertionError: a rank raised, died, or did not end in time. The message holds the error of every such rank.
        """
        self._calls += 1
        payload = pickle.dumps((function, args))
        try:
            self._start(world_size - len(self._ranks))
            for rank, (_, connection) in enumerate(self._ranks[:world_size]):
                connection.send(Call(rank, world_size, self._store.port, f"call {self._calls}", self.timeout_s, payload))
            answers = self._answers(world_size)
            errors = [f"rank {rank} of {function.__name__}:\n{answer}" for rank, answer in enumerate(answers) if isinstance(answer, str)]
            assert not errors, "\n".join(errors)
        except BaseException:
            self._end()
            raise
        return [pickle.loads(answer) for answer in answers if isinstance(answer, bytes)]

    def _start(self, count: int) -> None:
        context = mp.get_context("spawn")
        started = []
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()  # the death of the process must close the pipe
            self._ranks.append((process, here))
            started.append(here)
        for connection in started:
            connection.recv()  # "ready": what follows takes no time for imports

    def _answers(self, world_size: int) -> list[bytes | str]:
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks[:world_size])}
        answers: list[bytes | str] = ["did not end in time"] * world_size
        deadline = time.monotonic() + self.timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    process = self._ranks[rank][0]
                    process.join()
                    answers[rank] = f"died with exit code {process.exitcode}"
                if isinstance(answers[rank], str):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _end(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    RUNTIME.links.auto = None
    # What is tested are graphs and messages, not Inductor's C++: without it a graph compiles in one second instead of ten.
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fallback_by_default = True
    connection.send("ready")
    while True:
        try:
            call = connection.recv()
        except EOFError:  # whoever calls has died
            return
        answer = _answer(call)
        connection.send(answer)
        if isinstance(answer, str):
            os._exit(1)  # at once: this ends the collectives in which other ranks wait


def _answer(call: Call) -> bytes | str:
    """Returns the pickled result, or what was raised, formatted."""
    faulthandler.dump_traceback_later(max(1.0, call.timeout_s - 5))
    store = dist.PrefixStore(call.name, dist.TCPStore("127.0.0.1", call.port, is_master=False))
    answer: bytes | str
    try:
        torch.manual_seed(0)
        dist.init_process_group("gloo", store=store, rank=call.rank, world_size=call.world_size, timeout=GROUP_TIMEOUT)
        function, args = pickle.loads(call.payload)
        answer = pickle.dumps(function(call.rank, call.world_size, *args))
    except Exception:
        answer = traceback.format_exc()
        print(f"rank {call.rank}: {answer}", file=sys.stderr, flush=True)  # another rank may hang or die
    else:
        if dist.is_initialized():
            with suppress(RuntimeError):  # a rank that does not come says why itself
                dist.barrier()
        _forget()
    faulthandler.cancel_dump_traceback_later()
    return answer


def _forget() -> None:
    """Leaves nothing to the next call: no compiled graph, no compressor state, no report, no process group, no agreement about one."""
    torch._dynamo.reset()
    fresh = Runtime()
    for field in fields(Runtime):
        setattr(RUNTIME, field.name, getattr(fresh, field.name))
    RUNTIME.links.auto = None  # all ranks are on one machine, where nothing would be compressed
    gc.collect()
    gc.freeze()  # modules, most of all: the next collection need not look through them
    if dist.is_initialized():
        dist.destroy_process_group()
