"""Runs ranks in processes of their own on this machine. They end with the command, however it ends."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

import click
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn


def run_ranks(work: Callable[..., None], arguments: tuple[Any, ...], count: int, timeout_s: float | None = None) -> None:
    """Runs ``work(rank, *arguments)`` for each of ``count`` ranks, and waits for all of them.

    A Ctrl-C at the terminal reaches all processes at once. The ranks ignore it, so none of them reports an error of its own: this process
    kills them, and goes on with ``KeyboardInterrupt``.

    Args:
        work: A function of a module, for which a process can look by name.
        arguments: Values that can be pickled.
        count: The number of ranks.
        timeout_s: The longest time that they may take, in seconds; ``None`` for no limit.

    Raises:
        click.ClickException: A rank has failed, or took too long. All of them have ended.
    """
    _start_tracker()
    # Processes inherit what is blocked. A Ctrl-C that comes meanwhile is not lost: it waits here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ranks = spawn(_run, (work, arguments), nprocs=count, join=False)
        assert ranks is not None
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            end = None if timeout_s is None else time.monotonic() + timeout_s
            while not ranks.join(None if end is None else max(0.0, end - time.monotonic())):
                if end is not None and time.monotonic() >= end:
                    raise click.ClickException(f"not done after {timeout_s:g} s")
        finally:
            for process in ranks.processes:
                process.kill()
            for process in ranks.processes:
                process.join()
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise click.ClickException(str(error)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Starts multiprocessing's tracker now, because its start unblocks the signal. It removes what killed ranks leave, silently."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _run(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # torch asks for SIGINT, which is blocked here
    work(rank, *arguments)
