"""Runs a function on several gloo ranks, each a process of its own, and hands back what they return."""

import faulthandler
import hashlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import dct_compile

TIMEOUT_S = 150
GROUP_TIMEOUT = timedelta(seconds=60)
"""A collective that some rank never joins fails after this, instead of gloo's half an hour."""


class RankError(str):
    """What a rank raised, formatted."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(rank, world_size, *args)`` on every rank inside an initialised process group; the results in order of rank.

    The function must be importable (top level of a test module). Raises ``AssertionError`` with every rank's error when one raised;
    a function that is expected to fail catches the error itself and returns it.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The store lives here: a free port that is only looked up could be taken by somebody else before rank 0 listens on it.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = (function, world_size, store.port, folder, args)
        context = mp.start_processes(_main, arguments, nprocs=world_size, join=False, start_method="spawn")
        assert context is not None
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: ranks did not finish within {TIMEOUT_S} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    errors = [f"rank {rank} of {function.__name__}:\n{result}" for rank, result in enumerate(results) if isinstance(result, RankError)]
    assert not errors, "\n".join(errors)
    return results


def _main(rank: int, function: Callable[..., Any], world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # What is tested are graphs and messages, not Inductor's C++: without it a graph compiles in one second instead of ten.
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.fallback_by_default = True
    faulthandler.dump_traceback_later(TIMEOUT_S - 5)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    try:
        result = function(rank, world_size, *args)
    except Exception:
        result = RankError(traceback.format_exc())
        print(f"rank {rank}: {result}", file=sys.stderr, flush=True)  # the other ranks may crash the run before it is handed back
    torch.save(result, Path(folder) / f"{rank}.pt")
    if not isinstance(result, RankError):
        dist.barrier()
    dist.destroy_process_group()


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """What is compiled and reported inside starts from nothing: one process can hold several scenarios."""
    torch._dynamo.reset()
    dct_compile.reset_report()
    yield
    torch._dynamo.reset()


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of the tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
