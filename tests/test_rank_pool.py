"""Ranks that live on between tests: a call that fails, dies or hangs fails alone, and none sees anything of those before."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store

import dct_compile
from tests.rank_pool import RankPool
from tests.ranks_ddp import Part

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Starts another pool than that of all tests: the calls here end its ranks."""
    with RankPool() as pool:
        yield pool


def pid(rank: int, world_size: int) -> int:
    return os.getpid()


def test_ranks_live_on(rank_pool: RankPool) -> None:
    first = rank_pool.run(2, pid)
    assert len(set(first)) == 2
    assert rank_pool.run(2, pid) == first


def raising(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ArithmeticError("rank 1 cannot count")
    dist.barrier()


def test_errors_of_all_ranks_are_shown_with_those_of_ranks_that_waited(pool: RankPool) -> None:
    with pytest.raises(AssertionError) as caught:
        pool.run(2, raising)
    for rank in (0, 1):
        assert f"rank {rank} of raising:\nTraceback" in str(caught.value)
    assert "ArithmeticError: rank 1 cannot count" in str(caught.value)


def dying(rank: int, world_size: int) -> None:
    os._exit(3)


def test_a_rank_that_dies_is_told_and_replaced(pool: RankPool) -> None:
    with pytest.raises(AssertionError, match="rank 0 of dying:\ndied with exit code 3"):
        pool.run(1, dying)
    assert len(pool.run(1, pid)) == 1


def hanging(rank: int, world_size: int) -> None:
    time.sleep(1000)


def test_a_hang_is_ended(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "timeout_s", 3)
    with pytest.raises(AssertionError, match="rank 0 of hanging:\ndid not end in time"):
        pool.run(1, hanging)


def leaving_traces(rank: int, world_size: int) -> tuple[int, int, int]:
    """Returns the graphs in the report and own keys in the store that calls before have left, and graphs that this call compiles."""
    left = len(dct_compile.report().graphs), int(_get_default_store().check([f"trace {rank}"]))
    _get_default_store().set(f"trace {rank}", "left")
    torch.compile(Part(nn.Linear(2, 2)), backend="dct", options={"data_parallel": True})(torch.ones(1, 2)).sum().backward()
    return *left, len(dct_compile.report().graphs)


def test_nothing_is_left_of_calls_before(rank_pool: RankPool) -> None:
    for _ in range(2):
        assert rank_pool.run(2, leaving_traces) == [(0, 0, 1)] * 2


def size_of_default_group(rank: int, world_size: int) -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


@pytest.mark.parametrize("size", [1, 3, 2])
def test_every_call_has_a_group_of_its_own(rank_pool: RankPool, size: int) -> None:
    assert rank_pool.run(size, size_of_default_group) == [(rank, size) for rank in range(size)]


def ending_its_group(rank: int, world_size: int) -> bool:
    dist.destroy_process_group()
    return dist.is_initialized()


def test_a_call_may_end_its_group_itself(rank_pool: RankPool) -> None:
    assert rank_pool.run(2, ending_its_group) == [False, False]
    assert rank_pool.run(2, size_of_default_group) == [(0, 2), (1, 2)]
