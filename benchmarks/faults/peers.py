"""A peer that dies, stops, raises or sends nothing."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from faults.ranks import TIMEOUT_S, End, Rank, run, run_each
from faults.row import Row, check
from faults.training import GRADIENTS, WAYS, Training, batch

FAULTY, AT = 1, 2
"""The rank with the fault, and the step in which it comes."""
SHORT_S = 5.0
"""The timeout of a group in which a peer sends nothing."""
MARGIN_S = 10.0
"""Seconds that an error may take beyond what is expected: the machine may have other work."""
STOPPED_S = 20
COMPILED_S = 8.0
"""Seconds after which a rank has compiled the model, and waits for another one."""
_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Connection refused")
_NO_STORE = re.compile(r"the store in which ranks meet has gone|Connection was likely closed|Connection reset by peer|Broken pipe")
_LATE = re.compile(r"Timed out waiting \d+ms|Application timeout caused pair closure")


def _at_backward(loss: Tensor, action: Callable[[], None]) -> None:
    loss.register_hook(lambda gradient: action())


def faulty(rank: Rank, way: str, where: str, action: Callable[[Rank], None], timeout_s: float | None = None) -> None:
    """Trains for two steps. In the third, rank 1 calls ``action`` in its forward, its backward or while it exchanges.

    ``timeout_s``: that of the group from the third step on, if it changes.
    """
    training = Training(way)
    training.steps(rank.number, range(AT if where != "start" else 0))
    if timeout_s is not None:
        _set_pg_timeout(timedelta(seconds=timeout_s))
    mine = rank.number == FAULTY
    if mine and where in ("forward", "start"):
        action(rank)
    loss = training.loss(batch(rank.number, AT))
    if mine and where == "backward":
        _at_backward(loss, lambda: action(rank))
    if where == "exchange":
        if mine:
            threading.Timer(0.5, action, (rank,)).start()
        else:
            time.sleep(2)  # rank 1 waits for this rank meanwhile
    loss.backward()
    training.apply()
    training.steps(rank.number, range(AT + 1, AT + 3))


def die(rank: Rank) -> None:
    rank.strike(signal.SIGKILL)


def fall_silent(rank: Rank) -> None:
    rank.strike()
    time.sleep(3600)


def fail(rank: Rank) -> None:
    rank.strike()
    raise ValueError("an error of the user's code")


def pause(rank: Rank) -> None:
    """Stops this process; another one lets it go on after STOPPED_S."""
    subprocess.Popen(["sh", "-c", f"sleep {STOPPED_S}; kill -CONT {os.getpid()}"])
    rank.strike(signal.SIGSTOP)


def _seen(ends: list[End], pattern: re.Pattern[str], longest_s: float, way: str) -> float:
    """Returns the seconds after which all others had raised an error of ``pattern``, and checks both."""
    others = [end for number, end in enumerate(ends) if number != FAULTY]
    for end in others:
        check(bool(pattern.search(end.error)), f"{way}: {end.error or 'no error'}")
        check("Unable to cast" not in end.error, f"{way}: {end.error}")
    seconds = max(end.ended for end in others) - ends[FAULTY].struck
    check(seconds < longest_s, f"{way}: the error came after {seconds:.1f} s")
    return seconds


def killed(where: str, ranks: int, ways: tuple[str, ...], folder: Path) -> str:
    seconds = [_seen(run(ranks, faulty, way, where, die), _GONE, MARGIN_S, way) for way in ways]
    return f"so in {len(ways)} of {len(ways)} ways, after {max(seconds):.1f} s at most"


def raised(ways: tuple[str, ...], folder: Path) -> str:
    seconds = []
    for way in ways:
        ends = run(2, faulty, way, "backward", fail)
        check("an error of the user's code" in ends[FAULTY].error, f"{way}: {ends[FAULTY].error}")
        seconds.append(_seen(ends, _GONE, MARGIN_S, way))
    return f"so in {len(ways)} of {len(ways)} ways, after {max(seconds):.1f} s at most"


def silent(before_s: float, since_s: float | None, ways: tuple[str, ...], folder: Path) -> str:
    """Rank 1 sends nothing. ``before_s``, ``since_s``: the timeout of the group up to the third step, and from then on."""
    seconds = []
    for way in ways:
        ends = run(2, faulty, way, "backward", fall_silent, since_s, timeout_s=before_s, awaited=(0,))
        seconds.append(_seen(ends, _LATE, SHORT_S + MARGIN_S, way))
    return f"so in {len(ways)} of {len(ways)} ways, after {max(seconds):.1f} s at most"


def missing(ways: tuple[str, ...], folder: Path) -> str:
    """Rank 1 dies before its first forward: the others cannot tell it from one that compiles slowly."""
    pattern = re.compile(rf"waited {SHORT_S:g} s for rank 1, which did not come")
    seconds = [
        _seen(run(2, faulty, way, "start", die, timeout_s=SHORT_S, awaited=(0,)), pattern, SHORT_S + 2 * MARGIN_S, way) for way in ways
    ]
    return f"so in {len(ways)} of {len(ways)} ways, after {max(seconds):.1f} s at most"


def meeting_at_the_faulty(rank: Rank, way: str, action: Callable[[Rank], None]) -> None:
    """Trains in a group whose store lives in rank 1, which calls ``action`` before its first forward."""
    store, mine = _get_default_store(), rank.number == FAULTY
    if mine:
        held = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        store.set("port", str(held.port))
    client = TCPStore("127.0.0.1", int(store.get("port")), is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=client, rank=rank.number, world_size=rank.ranks, timeout=timedelta(seconds=TIMEOUT_S))
    faulty(rank, way, "start", action)


def die_awaited(rank: Rank) -> None:
    time.sleep(COMPILED_S)
    die(rank)


def store_lost(ways: tuple[str, ...], folder: Path) -> str:
    seconds = []
    for way in ways:
        seconds += [_seen(run(2, meeting_at_the_faulty, way, action), _NO_STORE, MARGIN_S, way) for action in (die, die_awaited)]
    return f"so in {len(ways)} of {len(ways)} ways, after {max(seconds):.1f} s at most"


def trained(rank: Rank, way: str, where: str) -> str:
    training = Training(way)
    for step in range(6):
        if (step, rank.number) == (AT, FAULTY) and where == "stopped":
            pause(rank)
        training.steps(rank.number, range(step, step + 1))
    return training.digest()


def stopped(ways: tuple[str, ...], folder: Path) -> str:
    cases = [(way, where) for way in ways for where in ("", "stopped")]
    found = run_each(2, trained, cases)
    for way, undisturbed, disturbed in zip(ways, found[::2], found[1::2], strict=True):
        check(undisturbed == disturbed, f"{way}: other parameters")
    return f"so in {len(ways)} of {len(ways)} ways"


_SOON = f"each other rank raises the group's own error (Connection closed by peer) within {MARGIN_S:g} s; the timeout is 60 s"
_IN_TIME = f"the other rank raises the group's own error (Timed out) after its timeout of {SHORT_S:g} s"
ROWS = (
    Row("kill -9 in the forward", "SIGKILL before the third forward; all ways", _SOON, 2, partial(killed, "forward", 2, WAYS)),
    Row("kill -9 in the backward", "SIGKILL in a hook of the third backward; all ways", _SOON, 3, partial(killed, "backward", 3, WAYS)),
    Row(
        "kill -9 in an exchange",
        "SIGKILL while it waits for a payload, which is due 1.5 s later; all ways",
        _SOON,
        2,
        partial(killed, "exchange", 2, WAYS),
    ),
    Row(
        "kill -9 before the first step",
        "SIGKILL before the first forward; all ways",
        f"the other rank names the one that did not come, after its timeout of {SHORT_S:g} s",
        2,
        partial(missing, WAYS),
    ),
    Row(
        "kill -9 of the rank that holds the store, before the first step",
        f"SIGKILL before the first forward, and {COMPILED_S:g} s later, when the other rank waits for it; all ways",
        f"the other rank says that the store has gone, or the store's own error (Connection was likely closed), within {MARGIN_S:g} s",
        2,
        partial(store_lost, WAYS),
    ),
    Row("an exception on one rank", "raised in a hook of the third backward; all ways", _SOON, 2, partial(raised, WAYS)),
    Row(
        "SIGSTOP for 20 s",
        "SIGSTOP before the third step, SIGCONT 20 s later; compile(DDP), data_parallel, arrival=late",
        "the training goes on, with the parameters of an undisturbed one, bit for bit",
        2,
        partial(stopped, (GRADIENTS[0], GRADIENTS[2], GRADIENTS[3])),
    ),
    Row(
        "a peer that lives but does not send",
        "an endless sleep in a hook of the third backward; all ways",
        _IN_TIME,
        2,
        partial(silent, SHORT_S, None, WAYS),
    ),
    Row(
        "a timeout that is shortened during a training",
        f"`_set_pg_timeout` from {TIMEOUT_S:g} s to {SHORT_S:g} s before the third step, then the same sleep; all ways",
        _IN_TIME,
        2,
        partial(silent, TIMEOUT_S, SHORT_S, WAYS),
    ),
)
