"""The link between the ranks of a process group: recognised where all are on one machine, else measured once, and agreed on.

The measurement is a rendezvous in the store, because a rank may compile long before the others. If one does not come in time, the group has
no link, on every rank, and the bytes decide.
"""

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from dct_compile.groups import store_of_life
from dct_compile.link import ONE_MACHINE, Link
from dct_compile.link_measure import device_of, measured
from dct_compile.reasons import Note

log = logging.getLogger("dct_compile")

PATIENCE_S = 30.0
"""A rank waits this long for the others to come and measure."""


@dataclass
class Links:
    """Knows the links of this process's groups.

    ``auto``: the meaning of the option "auto": "auto" itself, or a link or ``None`` in its place. ``measures``: whether a link that is not
    known may be measured, which all ranks of the group wait for. ``warn``: takes a note about a group whose link could not be measured.
    """

    auto: "str | Link | None" = "auto"
    measures: bool = True
    warn: "Callable[[str], None]" = log.warning
    _known: "WeakKeyDictionary[ProcessGroup, Link | None]" = field(default_factory=WeakKeyDictionary)
    _locks: "WeakKeyDictionary[ProcessGroup, threading.Lock]" = field(default_factory=WeakKeyDictionary)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, group: ProcessGroup, option: "str | Link | None") -> Link | None:
        """Returns the link between the ranks of ``group``, ``None`` where it is not known. The first call with "auto" waits for all ranks.

        Args:
            group: The process group.
            option: "auto", a link to assume, or ``None`` for none.
        """
        if self.measures and option == "auto" == self.auto and _has_link(group) and self.at_once(group, option) is None:
            # Another thread may ask for another group meanwhile, and ranks may do so in another order.
            with self._lock_of(group):
                if group not in self._known:
                    self._known[group] = _apart(agreed, group, measured)
                    if self._known[group] is None:
                        self.warn(Note.UNMEASURED.format(group=group.group_name, seconds=PATIENCE_S))
        return self.at_once(group, option)

    def _lock_of(self, group: ProcessGroup) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(group, threading.Lock())

    def at_once(self, group: ProcessGroup, option: "str | Link | None") -> Link | None:
        """Returns the link of ``group`` as far as it is known without the other ranks."""
        option = self.auto if option == "auto" else option
        if isinstance(option, Link):
            return option.on(device_of(group).type)
        if option is None or not _has_link(group):
            return None
        # GPUs of one machine may be linked by NVLink or by much less: that is measured.
        if device_of(group).type == "cpu" and on_one_machine():
            return ONE_MACHINE
        known = self._known.get(group)
        return None if known is None else known.on(device_of(group).type)

    def unmeasured(self) -> "Links":
        """Returns the same knowledge for a caller that must not wait for other ranks."""
        return replace(self, measures=False)


def _apart(action: "Callable[..., Link | None]", group: ProcessGroup, *arguments: Any) -> Link | None:
    """Calls ``action(group, *arguments)`` in a thread of its own, and waits for its end.

    A compilation may be the first to ask. Its thread makes fake tensors, and dispatches through Python: there an operator keeps the
    interpreter's lock while it waits for gloo's, which a thread of gloo may hold while it waits for the interpreter's.
    """
    device = device_of(group)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_on, device, action, group, *arguments).result()


def _on(device: torch.device, action: "Callable[..., Link | None]", *arguments: Any) -> Link | None:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return action(*arguments)


def _has_link(group: ProcessGroup) -> bool:
    return group.size() > 1 and dist.get_backend(group) != "fake"


def on_one_machine() -> bool:
    """Returns True if all ranks of this process's world are known to be on one machine: all ranks get the same answer.

    A launcher such as torchrun says so. Else ranks that have met over the loopback interface, or in one process, are.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdecimal():
        return int(local) == dist.get_world_size()
    store: Store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):
        return store.host == "localhost" or store.host.startswith("127.") or store.host == "::1"
    return isinstance(store, HashStore)


def host() -> str:
    """Returns a name for what this process shares its links with: the machine, and the network namespace in it."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/net').readlink()}"
    return socket.gethostname()


def agreed(
    group: ProcessGroup, measure: "Callable[[ProcessGroup, list[str]], Link]", patience_s: float = PATIENCE_S, recognise: bool = True
) -> Link | None:
    """Measures the link together with the other ranks of ``group``.

    Args:
        group: The process group; all of its ranks make this call.
        measure: The measurement, which all ranks make at once. It takes the group, and the host of each rank.
        patience_s: Seconds to wait for the ranks that have not come.
        recognise: Whether nothing is measured where all ranks name the same host.

    Returns:
        The same link on all ranks, or ``None`` on all ranks where one has not come in time.
    """
    store, _ = store_of_life(group, "links")
    store.set(f"host/{group.rank()}", host())
    if store.add("ranks", 1) == group.size():
        store.compare_set("come", "", "all")
    with suppress(RuntimeError):  # the time is over
        store.wait(["come"], timedelta(seconds=patience_s))
    # The first of both words counts, so all ranks read the same.
    if store.compare_set("come", "", "some") != b"all":
        return None
    if group.rank() == 0:
        store.set("hosts", json.dumps([store.get(f"host/{rank}").decode() for rank in range(group.size())]))
    hosts = json.loads(store.get("hosts"))
    if recognise and len(set(hosts)) == 1 and device_of(group).type == "cpu":
        return ONE_MACHINE
    link = measure(group, hosts)
    if group.rank() == 0:
        store.set("link", json.dumps(asdict(_remembered(link, group))))
    return Link(**json.loads(store.get("link")))


def _remembered(link: Link, group: ProcessGroup) -> Link:
    """Returns the link of an earlier run on these hosts where this one resembles it, so that a second run decides as the first one."""
    path, key = Path(cache_dir()) / "dct_links.json", _hosts(group)
    earlier: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):
        earlier = json.loads(path.read_text(encoding="utf-8"))
    with suppress(KeyError, TypeError):
        known = Link(**earlier[key])
        if known.resembles(link):
            return known
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({**earlier, key: asdict(link)}, indent=1), encoding="utf-8")
        written.replace(path)
    return link


def _hosts(group: ProcessGroup) -> str:
    """Returns a name for the place of the group: its backend and ranks, and the address where all ranks meet."""
    ranks = ",".join(map(str, dist.get_process_group_ranks(group)))
    return f"{dist.get_backend(group)} {ranks} of {dist.get_world_size()} at {os.environ.get('MASTER_ADDR', '')}"
