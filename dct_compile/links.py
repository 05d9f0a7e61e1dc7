"""The link between the ranks of a process group: recognised where all are on one machine, else measured once, and agreed on.

The measurement is a rendezvous in the store, because a rank may compile long before the others. If one does not come in time, the group has
no link, on every rank, and the bytes decide.
"""

import json
import logging
import os
import socket
import statistics
import threading
import time
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
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from dct_compile.groups import store_of_life
from dct_compile.link import ONE_MACHINE, Link

log = logging.getLogger("dct_compile")

PATIENCE_S = 30.0
"""A rank waits this long for the others to come and measure."""
_LONG_S = 0.05
"""A message that takes this long is long enough to tell the rate."""
_SMALLEST, _LARGEST = 2**16, 2**26
"""Bytes that a rank sends in the messages that tell the rate."""
_SHORT_MESSAGES = 9
_COPIED = 2**24
"""Elements of the tensors whose sum tells the rate of memory: 64 MiB each, more than most caches hold."""


@dataclass
class Links:
    """Knows the links of this process's groups.

    ``auto``: the meaning of the option "auto": "auto" itself, or a link or ``None`` in its place. ``measures``: whether a link that is not
    known may be measured, which all ranks of the group wait for.
    """

    auto: "str | Link | None" = "auto"
    measures: bool = True
    _known: "WeakKeyDictionary[ProcessGroup, Link | None]" = field(default_factory=WeakKeyDictionary)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, group: ProcessGroup, option: "str | Link | None") -> Link | None:
        """Returns the link between the ranks of ``group``, ``None`` where it is not known. The first call with "auto" waits for all ranks.

        Args:
            group: The process group.
            option: "auto", a link to assume, or ``None`` for none.
        """
        if self._is_open(group, option):
            with self._lock:
                if group not in self._known:
                    self._known[group] = _apart(agreed, group, measured)
        return self.at_once(group, option)

    def at_once(self, group: ProcessGroup, option: "str | Link | None") -> Link | None:
        """Returns the link of ``group`` as far as it is known without the other ranks."""
        option = self.auto if option == "auto" else option
        if isinstance(option, Link):
            return option.on(device_of(group).type)
        if option is None or group.size() == 1 or dist.get_backend(group) == "fake":
            return None
        # GPUs of one machine may be linked by NVLink or by much less: that is measured.
        return ONE_MACHINE if device_of(group).type == "cpu" and on_one_machine() else self._known.get(group)

    def unmeasured(self) -> "Links":
        """Returns the same knowledge for a caller that must not wait for other ranks."""
        return replace(self, measures=False)

    def _is_open(self, group: ProcessGroup, option: "str | Link | None") -> bool:
        """Returns True if the link is to be measured, and was not yet."""
        asked = self.measures and option == "auto" == self.auto
        return asked and group.size() > 1 and group not in self._known and self.at_once(group, option) is None and _can_measure(group)


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


def _can_measure(group: ProcessGroup) -> bool:
    return dist.get_backend(group) != "fake"


def device_of(group: ProcessGroup) -> torch.device:
    """Returns the device whose tensors the group sends: the current GPU where it has a backend for those, else the CPU. Gloo takes both."""
    gpu = next((device for device in group._device_types if device.type == "cuda" and torch.cuda.is_available()), None)
    if gpu is None or group._get_backend(gpu).name() == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


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


def agreed(group: ProcessGroup, measure: "Callable[[ProcessGroup], Link]", patience_s: float = PATIENCE_S) -> Link | None:
    """Measures the link together with the other ranks of ``group``.

    Args:
        group: The process group; all of its ranks make this call.
        measure: The measurement, which all ranks make at once.
        patience_s: Seconds to wait for the ranks that have not come.

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
        log.warning("the link of group %s was not measured: a rank has not come within %g s", group.group_name, patience_s)
        return None
    if group.rank() == 0:
        hosts = {store.get(f"host/{rank}") for rank in range(group.size())}
        store.set("hosts", str(len(hosts)))
    if store.get("hosts") == b"1" and device_of(group).type == "cpu":
        return ONE_MACHINE
    link = measure(group)
    if group.rank() == 0:
        store.set("link", json.dumps(asdict(_remembered(link, group))))
    return Link(**json.loads(store.get("link")))


def measured(group: ProcessGroup) -> Link:
    """Measures latency and rate with the collective that carries payloads. All ranks of ``group`` make this call, and get the same link.

    Takes less than two seconds from a rate of 1 Mbit/s on.
    """
    device, ranks = device_of(group), group.size()
    short = torch.zeros(8, dtype=torch.uint8, device=device)
    _slowest(_gather_seconds(short, group), group)  # connections are made at the first message
    latency_s = statistics.median(_gather_seconds(short, group) for _ in range(_SHORT_MESSAGES))
    latency_s = _slowest(latency_s, group) / (ranks - 1)
    sent, seconds = 0.0, latency_s
    size = _SMALLEST
    while size <= _LARGEST and seconds < _LONG_S:
        message = torch.zeros(-(-size // (ranks - 1)), dtype=torch.uint8, device=device)
        taken = _slowest(min(_gather_seconds(message, group) for _ in range(2 if seconds < _LONG_S / 4 else 1)), group)
        sent, seconds = float(message.numel() * (ranks - 1)), taken
        size *= 4
    wire_s = max(seconds - (ranks - 1) * latency_s, seconds / 2)
    return Link(sent / wire_s, latency_s, 1 / _slowest(1 / _copy_rate(device), group))


def _gather_seconds(message: Tensor, group: ProcessGroup) -> float:
    gathered = message.new_empty(group.size() * message.numel())
    _finish(message)
    start = time.perf_counter()
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on, and before
    all_gather(gathered, message, group=group)
    _finish(message)
    return time.perf_counter() - start


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _slowest(seconds: float, group: ProcessGroup) -> float:
    """Returns the largest of all ranks' numbers."""
    value = torch.tensor([seconds], dtype=torch.float64, device=device_of(group))
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return float(value.item())


def _copy_rate(device: torch.device) -> float:
    """Returns bytes per second that an operator reads and writes."""
    one, other = torch.ones(_COPIED, device=device), torch.ones(_COPIED, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.add(one, other, out=other)
        _finish(other)
        times.append(time.perf_counter() - start)
    return 3 * other.numel() * other.itemsize / min(times)


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
