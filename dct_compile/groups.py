"""Facts about a process group: its timeout, its hosts, and a part of the store for one of its lives."""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

_LOOK_S = 2.0
"""The longest that a store is asked. It answers late where another thread of this process is waiting in it by the same client."""
T = TypeVar("T")


def timeout_s(group: ProcessGroup) -> float:
    """Returns the timeout of the group's collectives in seconds: the longest where it has several backends."""
    found = [default_pg_timeout.total_seconds()] if not group._device_types else []
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        found.append(getattr(options, "_timeout", default_pg_timeout).total_seconds())
    return max(found)


def ranks_per_host(group: ProcessGroup, option: int | str) -> int:
    """Returns how many ranks of ``group`` each host has, where they are numbered host by host and are as many on each; else 1.

    Args:
        group: The process group.
        option: The ranks of the world on each host, or "auto" for the number of ranks that torchrun has started on this one.

    Raises:
        ValueError: ``option`` is a number that does not divide the ranks of the world.
    """
    world = dist.get_world_size()
    local = os.environ.get("LOCAL_WORLD_SIZE", "1") if option == "auto" else str(option)
    count = int(local) if local.isdecimal() else 1
    if count < 1 or world % count:
        if option == "auto":
            return 1
        raise ValueError(f"option 'ranks_per_host' is {option}; allowed is a number that divides the {world} ranks")
    hosts = [rank // count for rank in dist.get_process_group_ranks(group)]
    sizes = set(Counter(hosts).values())
    return sizes.pop() if len(sizes) == 1 and hosts == sorted(hosts) else 1


def store_of_life(group: ProcessGroup, purpose: str) -> tuple[PrefixStore, int]:
    """Opens a part of the default store that is new for each life of ``group``: the store may outlive a group whose name comes again.

    Args:
        group: The process group. All of its ranks make this call equally often.
        purpose: The name of the user of that part. Lives are counted for each purpose.

    Returns:
        The part of the store, and the number of the life from 1 on: equal on all ranks of the group.

    Raises:
        RuntimeError: The store has gone.
    """
    ranks = dist.get_process_group_ranks(group)
    # Groups that split_group makes at once share a name, so the ranks are part of the prefix.
    members = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
    base = PrefixStore(f"dct_compile/{purpose}/{group.group_name}/{members}", own_client())
    life = base.add(f"lives/{group.rank()}", 1)
    return PrefixStore(str(life), base), life


def own_client() -> Store:
    """Returns a further client of the default store. One that waits would keep the other threads of this process from a common one.

    Raises:
        RuntimeError: The store has gone. The old client knows that at once; a new one would try to reach it for as long as its timeout.
    """
    store = _get_default_store()
    answer = ask(lambda: store.check(["dct_compile"]))
    error = answer.exception() if answer.done() else None
    if error is not None:
        raise RuntimeError(
            f"the store in which ranks meet has gone: the process that holds it has ended, as a rule rank 0. {error}"
        ) from error
    client: Store = store.clone()  # type: ignore[attr-defined]
    return client


def ask(question: Callable[[], T]) -> Future[T]:
    """Asks a store in a thread of its own. Returns the answer or the error, or after two seconds a future that is not done."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except Exception as error:
            answer.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_LOOK_S)
    return answer
