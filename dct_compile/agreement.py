"""Compares the sites of a group's ranks before the first exchange: all ranks must compress alike, or their payloads would not fit together.

A rank *posts* the sites that it is about to exchange for the first time. Its posts are a log in the store, one log per rank:

    rank 0:  [A, B]  [C]            two graphs
    rank 1:  [A]  [B, C]            the same model, cut elsewhere by a graph break

The group's rank 0 reads the logs of all others. They read that of rank 0, so the messages are O(ranks). A rank goes on once every other
rank has posted one of its new sites. It cannot wait for all of them: rank 1 posts B only after it has exchanged A.
However a model is cut, the sites of one rank contain those of the other at any time. If both have a site that the other lacks, they differ.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from dct_compile.groups import ask, store_of_life, timeout_s
from dct_compile.posts import Log, Post, Signature, difference

_GRACE_S = 10.0
"""After the group's timeout, rank 0 reports the missing ranks. The others wait this much longer for its report."""
_CLOCK_S = 0.1
"""The largest lead of a store's clock over the deadline."""


class Agreement:
    """Remembers, for each process group, what its ranks have agreed on. A record lives as long as the group object."""

    def __init__(self) -> None:
        self._records: WeakKeyDictionary[ProcessGroup, _Record] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def check(self, group: ProcessGroup, options: Mapping[str, object], signatures: Sequence[Signature], *, fresh: bool) -> None:
        """Compares the sites of a graph with those of the other ranks. Call it before the graph runs for the first time.

        Returns at once where nothing is new, for a group of one rank, and for the "fake" backend. After an error the group starts anew.

        Args:
            group: The process group of the sites.
            options: The options as plain values; named in the message where they differ.
            signatures: The sites, in the order of the graph.
            fresh: True: all ranks of ``group`` make this call now. All of ``signatures`` are compared, in order.
                False: only those are compared whose key and decision the group has not seen; other ranks may come later, or not at all.

        Raises:
            RuntimeError: The ranks differ (on every rank), or a rank did not come within the group's timeout.
        """
        if group.size() == 1 or dist.get_backend(group) == "fake":
            return
        with self._lock:
            record = self._records.get(group)
            if record is None:
                record = self._records[group] = _Record(group)
        try:
            record.check(options, signatures, fresh, timeout_s(group))
        except BaseException:  # an interrupt as well: the other ranks are told or give up, and begin anew
            self._records.pop(group, None)
            raise

    def explain(self, group: ProcessGroup, error: BaseException) -> None:
        """Adds a note to ``error``, raised by a collective of ``group``, if a rank has left because the ranks differ.

        Returns within two seconds, and never raises: the store may be gone together with the other rank.

        Args:
            group: The process group of the collective.
            error: The exception, on its way up. It is changed in place.
        """
        record = self._records.get(group)
        if record is None:
            return
        answer = ask(record.verdict)
        if answer.done() and answer.exception() is None and answer.result():
            error.add_note(answer.result())


class _Record:
    """One *life* of a process group: from its first check to its end, or to an error.

    The store may outlive the group and its name may come again, so what is kept there is numbered by life. ``mine`` is this rank's log,
    ``others`` are the logs that it reads.
    """

    def __init__(self, group: ProcessGroup) -> None:
        ranks = dist.get_process_group_ranks(group)
        rank = group.rank()
        self.name = group.group_name
        logs = [Log(i, str(i) if i == at else f"{i} (global rank {at})") for i, at in enumerate(ranks)]
        self.store, _ = store_of_life(group, "agreement")
        self.mine = logs[rank]
        self.others = logs[1:] if rank == 0 else logs[:1]
        self.lock = threading.Lock()

    def check(self, options: Mapping[str, object], signatures: Sequence[Signature], fresh: bool, timeout_s: float) -> None:
        with self.lock:
            new = tuple(signatures) if fresh else tuple(dict.fromkeys(item for item in signatures if item not in self.mine.known))
            if not new and not fresh:
                return
            ordinal = 1 + sum(1 for post in self.mine.posts if post.fresh) if fresh else 0
            text = Post(ordinal, options, new).pack()
            self.store.set(f"{self.mine.rank}/{len(self.mine.posts)}", text)
            self.mine.add(Post.unpack(text))
            act = self._lead if self.mine.rank == 0 else self._follow
            verdict = act(text, timeout_s)
            if verdict:
                self.store.set("verdict", verdict)
                raise RuntimeError(verdict)

    def verdict(self) -> str:
        """Returns the reason why a rank of the group has given up, or an empty string."""
        with self.lock:
            return self._given_up()

    def _lead(self, text: str, timeout_s: float) -> str:
        """Waits for all other ranks, as rank 0 does, and tells them the verdict."""
        deadline = time.monotonic() + timeout_s
        missing: list[Log] = []
        verdict = ""
        for log in self.others:
            if not self._meet(log, text, deadline):
                missing.append(log)
            verdict = self._difference(log)
            if verdict:
                break
        if missing and not verdict:
            verdict = self._absence(missing, timeout_s)
        verdict = verdict or self._given_up()
        self.store.set(f"done/{len(self.mine.posts) - 1}", verdict)
        return verdict

    def _given_up(self) -> str:
        return self.store.get("verdict").decode() if self.store.check(["verdict"]) else ""

    def _follow(self, text: str, timeout_s: float) -> str:
        """Waits for rank 0 and its verdict, as every other rank does."""
        log = self.others[0]
        if not self._meet(log, text, time.monotonic() + timeout_s):
            return self._absence([log], timeout_s)
        told = _read(self.store, f"done/{len(log.posts) - 1}", time.monotonic() + timeout_s + _GRACE_S)
        if told is None:
            return self._absence([log], timeout_s)
        # Rank 0 may have posted before this rank did; then it has not compared the two.
        return self._difference(log) or told

    def _meet(self, log: Log, text: str, deadline: float) -> bool:
        """Reads the log of another rank until that rank has come to the last post of this one, or differs.

        Returns False if it did not come before the deadline.
        """
        post = self.mine.posts[-1]
        while not log.has_met(post) and not self._difference(log):
            found = _read(self.store, f"{log.rank}/{len(log.posts)}", deadline)
            if found is None:
                return False
            log.add(post if found == text else Post.unpack(found))
        return True

    def _difference(self, log: Log) -> str:
        found = difference(self.mine, log)
        if not found:
            return ""
        return (
            f"ranks {self.mine.rank_name} and {log.rank_name} of group {self.name!r} would compress differently: {found}. "
            "All ranks need the same options for backend 'dct' and the same model."
        )

    def _absence(self, missing: Sequence[Log], timeout_s: float) -> str:
        post = self.mine.posts[-1]
        site = post.signatures[0].titled(0) if post.signatures else "a model for the first time"
        names = ", ".join(log.rank_name for log in missing)
        return (
            f"rank {self.mine.rank_name} of group {self.name!r} is about to use {site}, and waited {timeout_s:g} s for rank {names}, "
            "which did not come. Look there for an error or a slow compilation. Look for a condition that lets only some ranks run this "
            "part of the model. The time is the timeout of the process group."
        )


def _read(store: Store, key: str, deadline: float) -> str | None:
    """Returns the value of ``key``, or ``None`` if nobody sets it before ``deadline`` (of the monotonic clock)."""
    if not store.check([key]):
        left = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([key], timedelta(seconds=left))
        except RuntimeError:  # stores do not raise the same class when time is up
            if time.monotonic() < deadline - _CLOCK_S:
                raise
            return None
    return store.get(key).decode()
