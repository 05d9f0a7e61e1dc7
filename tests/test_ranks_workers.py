"""The thread and the group of DDP's exchanges: shared by models, released with their process group, ordered, and clear about errors."""

import gc
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group, _set_pg_timeout

import dct_compile
from dct_compile.integrations.ddp_reducer import _result
from dct_compile.workers import Workers
from tests.rank_pool import GROUP_TIMEOUT, Ranks
from tests.ranks import digest
from tests.ranks_balance import wrap
from tests.ranks_ddp import Net, Options, batch, ddp_of, loss_of, train

pytestmark = pytest.mark.distributed


def held() -> tuple[int, int]:
    """Returns the descriptors and the threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def settled() -> tuple[int, int]:
    """Returns :func:`held` when it no longer changes: threads end by themselves."""
    gc.collect()
    seen = [held()]
    while len(seen) < 4 or len(set(seen[-4:])) > 1:
        time.sleep(0.1)
        seen.append(held())
    return seen[-1]


def use_a_model(rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Trains a new DDP model for a step."""
    module = wrap(Net(), {}, process_group=group)
    loss_of(module(batch(rank, 0))).backward()


def many_models(rank: int, world_size: int) -> list[tuple[int, int]]:
    use_a_model(rank)
    warm = settled()
    for _ in range(25):
        use_a_model(rank)
    return [warm, settled()]


def many_subgroups(rank: int, world_size: int) -> list[tuple[int, int]]:
    def use_a_subgroup() -> None:
        group = dist.new_group([0, 1])
        use_a_model(rank, group)
        dist.destroy_process_group(group)

    use_a_subgroup()
    warm = settled()
    for _ in range(5):
        use_a_subgroup()
    return [warm, settled()]


def many_worlds(rank: int, world_size: int) -> list[tuple[int, int]]:
    """The world is destroyed and made again, in the same store and with the same name."""
    base = _get_default_store()
    seen: list[tuple[int, int]] = []
    for world in range(11):
        dist.barrier()  # the other rank may still connect, or count the descriptors of this world
        dist.destroy_process_group()
        gc.collect()
        store = PrefixStore(f"world {world}", base)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
        use_a_model(rank)
        seen += [settled()] if world in (0, 10) else []
    return seen


@pytest.mark.parametrize("repeat", [many_models, many_subgroups, many_worlds])
def test_neither_descriptors_nor_threads_are_left_behind(ranks2: Ranks, repeat: Callable[..., Any]) -> None:
    for warm, after in ranks2(repeat):
        assert after == warm


def late_end(rank: int, world_size: int) -> bool:
    """The thread of a world that has gone ends when the next world has a group of the same name. Returns whether that one is left."""
    base, workers, may_end, before = _get_default_store(), Workers(), threading.Event(), set(threading.enumerate())
    names = []
    for world in range(2):
        dist.barrier()  # the other rank may still connect
        dist.destroy_process_group()
        gc.collect()
        store = PrefixStore(f"world {world}", base)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
        worker = workers.of(dist.group.WORLD)
        names.append(worker.group.group_name)
        if world == 0:
            worker.submit(may_end.wait)
            (first,) = [thread for thread in threading.enumerate() if thread.name == "dct-exchanges" and thread not in before]
            del worker
    assert names[0] == names[1]
    may_end.set()
    first.join(GROUP_TIMEOUT.total_seconds())
    assert not first.is_alive()
    return _resolve_process_group(names[1]) is worker.group


def test_the_end_of_a_world_leaves_the_next_one_alone(ranks2: Ranks) -> None:
    assert ranks2(late_end) == [True, True]


def uneven_groups(rank: int, world_size: int) -> str:
    """Rank 0 is in a group more than rank 1."""
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    module = wrap(Net(), {})
    train(module, module, rank, range(2))
    return digest(module.parameters())


def test_ranks_may_be_in_different_numbers_of_groups(ranks2: Ranks) -> None:
    first, second = ranks2(uneven_groups)
    assert first == second


def two_threads(rank: int, world_size: int) -> tuple[list[list[str]], list[list[str]]]:
    """Trains two models at once, each over a process group of its own, started in another order on each rank; then one after the other."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]

    def trainings() -> list[Callable[[], list[str]]]:
        pairs = [ddp_of(Net(width), {"dp_density": 0.05}, inside=True, process_group=groups[i]) for i, width in enumerate((32, 48))]
        for step, (_, compiled) in enumerate(pairs):
            compiled(batch(rank, step))  # two threads that compile for the first time at once can block each other inside of torch
        return [lambda pair=pair: train(*pair, rank, range(8)) for pair in pairs]

    found: dict[int, list[str]] = {}
    threads = [
        threading.Thread(target=lambda i=i, run=run: found.__setitem__(i, run()), name=f"training {i}", daemon=True)
        for i, run in enumerate(trainings())
    ]
    for thread in threads if rank == 0 else reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    at_once = [found.get(i, []) for i in range(2)]
    torch._dynamo.reset()
    return at_once, [run() for run in trainings()]


def test_two_models_train_in_two_threads(ranks2: Ranks) -> None:
    (first, alone), (second, _) = ranks2(two_threads)
    assert first == second
    assert first == alone


def stuck(rank: int, world_size: int, inside: bool, options: Options, shortened: bool) -> tuple[str, float]:
    """Returns the error of a backward that rank 1 comes to only after the timeout of the group, and after how many seconds it came.

    ``shortened``: the group gets its timeout after two steps, not before the first.
    """
    short = timedelta(seconds=3)
    group = dist.new_group(list(range(world_size)), timeout=GROUP_TIMEOUT if shortened else short)
    module, compiled = ddp_of(Net(), options, inside, process_group=group)
    train(module, compiled, rank, range(2))
    if shortened:
        _set_pg_timeout(short, group)
    loss = loss_of(compiled(batch(rank, 2)))
    if rank == 1:
        time.sleep(5)
    started = time.monotonic()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - started
    return "", time.monotonic() - started


def check_in_time(found: tuple[str, float]) -> None:
    error, seconds = found
    assert re.search("Timed out waiting 3000ms|Application timeout caused pair closure", error)
    assert seconds < 4.5


@pytest.mark.parametrize("shortened", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_the_timeout_of_the_group_holds(ranks2: Ranks, inside: bool, shortened: bool) -> None:
    check_in_time(ranks2(stuck, inside, {}, shortened)[0])


def test_the_timeout_reaches_the_groups_of_both_levels(ranks4: Ranks) -> None:
    """Rank 0 waits for rank 1 inside of their host, rank 3 across hosts."""
    found = ranks4(stuck, False, {"gradient_scheme": "two_level", "ranks_per_host": 2}, True)
    check_in_time(found[0])
    check_in_time(found[3])


def dying(rank: int, world_size: int, inside: bool) -> None:
    module, compiled = ddp_of(Net(), {}, inside)
    train(module, compiled, rank, range(2))
    loss = loss_of(compiled(batch(rank, 2)))
    if rank == 1:
        os._exit(7)
    loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_the_error_names_the_connection_to_a_rank_that_died(ranks2: Ranks, inside: bool) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of dying:\ndied with exit code 7") as raised:
        ranks2(dying, inside)
    assert re.search(r"RuntimeError: .*Connection (closed|reset) by peer", str(raised.value))
    assert "Unable to cast" not in str(raised.value)


def test_what_is_known_of_another_rank_stays_with_the_error() -> None:
    error = RuntimeError("Connection closed by peer")
    error.add_note("ranks 0 and 1 would compress differently")
    promise: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    seen = promise.then(_result)
    promise.set_exception(error)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="Connection closed by peer") as raised:
        seen.wait()
    assert "ranks 0 and 1 would compress differently" in str(raised.value)


def reported_late(rank: int, world_size: int) -> list[tuple[str, bool, bool]]:
    use_a_model(rank)
    dist.destroy_process_group()
    gc.collect()
    graphs = dct_compile.report().graphs
    return [(graph.name, "all_reduce" in graph.before, "threshold_pack" in graph.after) for graph in graphs]


def test_the_report_shows_the_graph_of_a_bucket_whose_group_is_gone(ranks2: Ranks) -> None:
    for (name, *shown), *others in ranks2(reported_late):
        assert name.startswith("DDP(Net) bucket 0")
        assert shown == [True, True]
        assert not others
