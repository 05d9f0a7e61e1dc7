"""The thread and the process group in which the exchanges of DDP modules run: one of each for every process group of DDP's.

Exchanges run in the order in which the buckets of all modules over that process group are ready. It is the order in which DDP itself would
start its collectives, so it is the same on all ranks wherever it is for DDP. Models that are trained in threads of their own need a process
group each, as with DDP itself.
"""

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from queue import SimpleQueue

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from dct_compile.comm import Comm, HostsComm
from dct_compile.groups import store_of_life, timeout_s

_Tasks = SimpleQueue[Callable[[], None] | None]
_LOOK_S = 0.1
"""Seconds between two looks at a thread that may have ended."""


class ExchangeWorker:
    """Runs exchanges one after the other, beside the backward. ``group``: theirs alone.

    Collectives that the user starts meanwhile would come between two exchanges at another place on each rank.
    """

    def __init__(self, process_group: ProcessGroup) -> None:
        self.group = _further_group(process_group, dist.get_process_group_ranks(process_group))
        self._process_group = weakref.ref(process_group)
        self._timeout_s = timeout_s(process_group)
        self._levels: dict[int, tuple[ProcessGroup, ProcessGroup]] = {}
        self._made = [weakref.ref(self.group)]
        self._tasks: _Tasks = SimpleQueue()
        # The queue is made for it: a finalizer runs in the middle of any code, with any lock held.
        weakref.finalize(process_group, self._tasks.put, None).atexit = False
        self._thread = threading.Thread(target=_work, args=(self._tasks, self._made), name="dct-exchanges", daemon=True)
        self._thread.start()

    def take_over_timeout(self) -> None:
        """Gives the groups of the exchanges the timeout that the process group has now: users set another one during a training."""
        current = timeout_s(self._served())
        if current != self._timeout_s:
            self._timeout_s = current
            for group in (self.group, *chain.from_iterable(self._levels.values())):
                group.set_timeout(timedelta(seconds=current))

    def comm(self, per_host: int) -> HostsComm:
        """Returns the collectives of exchanges at two levels, on hosts of ``per_host`` ranks. All ranks make this call."""
        whole, ranks = self.group.group_name, self.group.size()
        inside, across = (Comm(group.group_name, group.size()) for group in self._levels_of(per_host))
        return HostsComm(whole, ranks, inside=inside, across=across)

    def _levels_of(self, per_host: int) -> tuple[ProcessGroup, ProcessGroup]:
        if per_host not in self._levels:
            process_group = self._served()
            ranks, place = dist.get_process_group_ranks(process_group), process_group.rank() % per_host
            host = process_group.rank() - place
            inside = _further_group(process_group, ranks[host : host + per_host], f"host {host} of {per_host}")
            across = _further_group(process_group, ranks[place::per_host], f"place {place} of {per_host}")
            self._made += [weakref.ref(inside), weakref.ref(across)]
            self._levels[per_host] = inside, across
        return self._levels[per_host]

    def _served(self) -> ProcessGroup:
        process_group = self._process_group()
        assert process_group is not None, "a model is trained over it"
        return process_group

    def submit(self, task: Callable[[], None]) -> None:
        """Runs ``task``, which raises nothing, after those submitted before. Returns at once."""
        self._tasks.put(task)

    def finish(self) -> None:
        """Waits until all tasks that were submitted have ended, or the thread with its process group."""
        done = threading.Event()
        self._tasks.put(done.set)
        while self._thread.is_alive() and not done.wait(_LOOK_S):
            pass


@dataclass
class _Slot:
    lock: threading.Lock = field(default_factory=threading.Lock)
    worker: ExchangeWorker | None = None


class Workers:
    """The workers of this process. One ends together with the process group that it serves."""

    def __init__(self) -> None:
        self._slots: weakref.WeakKeyDictionary[ProcessGroup, _Slot] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # A thread that comes back from an exchange while the interpreter ends would abort the process.
        atexit.register(_finish, weakref.ref(self))

    def of(self, process_group: ProcessGroup) -> ExchangeWorker:
        """Returns the worker for DDP modules over ``process_group``. The first call makes it, and waits for all ranks of the group."""
        with self._lock:
            slot = self._slots.setdefault(process_group, _Slot())
        with slot.lock:
            if slot.worker is None:
                slot.worker = ExchangeWorker(process_group)
            return slot.worker


def _finish(workers: "weakref.ref[Workers]") -> None:
    found = workers()
    for slot in list(found._slots.values()) if found is not None else ():
        if slot.worker is not None:
            slot.worker.finish()


def _work(tasks: _Tasks, groups: "list[weakref.ref[ProcessGroup]]") -> None:
    """Runs ``tasks`` up to the ``None`` that ends them, and gives up the groups. Holds none, which would not be released at exit.

    A group is not looked up by its name: another one may have that by now, in a world that was made after this one has gone.
    """
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds the buffers of a model
    for ref in groups:
        with suppress(Exception):  # the whole world may be gone, and the group with it
            if (own := ref()) is not None:
                dist.destroy_process_group(own)


def _further_group(process_group: ProcessGroup, ranks: Sequence[int], part: str = "") -> ProcessGroup:
    """Makes a further group of ``ranks`` of ``process_group``, with its backends and timeout. All of its ranks make this call.

    It is not made by ``dist.new_group``: that names a group by the number of groups in this process, or needs all ranks of the world. Two
    threads that make one each, or ranks with different numbers of groups, would meet in the wrong one.

    Args:
        process_group: The group.
        ranks: Those of the world that are to be in the further group, this one among them, in order.
        part: A name for them, where they are not all.
    """
    store, life = store_of_life(process_group, f"groups {part}".rstrip())
    name = f"{process_group.group_name}/dct/{life}" + (f"/{part}" if part else "")
    group: ProcessGroup
    group, _ = _new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        list(ranks),
        dist.get_backend(process_group),
        store,
        name,  # type: ignore[arg-type]
        timeout=timedelta(seconds=timeout_s(process_group)),
        group_desc="exchanges of dct_compile",
    )
    _world.pg_group_ranks[group] = {rank: position for position, rank in enumerate(ranks)}
    return group
