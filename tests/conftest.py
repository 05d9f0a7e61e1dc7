"""Set-up shared by all tests."""

import gc
import os
import signal
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# Jobs in the background of a shell ignore it, and so would every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this when a kernel is decorated, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from dct_compile.optim import Bypass
from dct_compile.state.gradient_use import GradientUse
from tests.exchanging import Exchanging
from tests.rank_pool import RankPool, Ranks
from tests.ranks import fresh_compiler
from tests.slow_compiler import Machine
from tests.tracing import fake_group


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Provides the ranks that serve all tests, one call after another."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks2(rank_pool: RankPool) -> Ranks:
    """Runs functions on two gloo ranks: ``ranks2(function, *args)`` returns ``function(rank, 2, *args)`` of each rank."""
    return partial(rank_pool.run, 2)


@pytest.fixture(scope="module")
def ranks2_once(ranks2: Ranks) -> Ranks:
    """Runs like ``ranks2``, but makes a call with the same arguments once per module: several tests look at its result."""
    return cache(ranks2)


@pytest.fixture(scope="session")
def ranks3(rank_pool: RankPool) -> Ranks:
    return partial(rank_pool.run, 3)


@pytest.fixture(scope="session")
def ranks4(rank_pool: RankPool) -> Ranks:
    return partial(rank_pool.run, 4)


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """Initialises a gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def fake_group_of_two() -> Iterator[None]:
    """Initialises a group of two ranks that sends nothing, with an empty report and nothing compiled."""
    with fake_group(2), fresh_compiler():
        yield


@pytest.fixture(scope="module")
def use() -> Iterator[GradientUse]:
    """Records gradients as exchanged, and lets optimizers step these parameters without their first moment."""
    found = Exchanging()
    bypass = Bypass(found, lambda optimizer, count: None)
    yield found
    del bypass
    gc.collect()  # the hooks of both go with them


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN or the largest integer: whoever reads or leaves them fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Provides a folder for libraries of kernels, and a compiler that is as slow as wanted. No build outlives the test."""
    made = Machine(tmp_path, monkeypatch)
    yield made
    made.end_builds()
