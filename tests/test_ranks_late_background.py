"""Exchanges beside the next step: they hold up nothing, their errors reach whoever reads the state, and the report names them."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.reasons import Reason
from dct_compile.runtime import RUNTIME
from tests.rank_pool import GROUP_TIMEOUT, Ranks
from tests.ranks_balance import wrap
from tests.ranks_ddp import Net, batch, loss_of
from tests.test_ranks_late_runs import ALL, LATE, Training

pytestmark = pytest.mark.distributed


def blocked(rank: int, world_size: int) -> list[bool]:
    """Trains for a step while the thread of the exchanges is blocked. Returns whether the exchange was under way, and has ended."""
    training = Training(rank, LATE)
    training.steps(range(2))
    may_run = threading.Event()
    RUNTIME.workers.of(training.module.process_group).submit(lambda: may_run.wait(GROUP_TIMEOUT.total_seconds()) and None)
    training.steps([2])
    bucket, _ = next(iter(RUNTIME.states.entries(training.module.module.top.weight)))
    assert bucket.under_way is not None
    waiting = threading.Thread(target=bucket.under_way)
    waiting.start()
    waiting.join(0.5)
    was_under_way = waiting.is_alive()
    may_run.set()
    return [was_under_way, bool(dct_compile.state_dict(training.module)["top.weight"]["late"].any())]


def test_the_exchange_runs_beside_the_step(ranks2: Ranks) -> None:
    """Neither the compressed gradients nor the dense ones wait for it."""
    assert ranks2(blocked) == [[True, True]] * 2


def failing(rank: int, world_size: int) -> list[str]:
    """Rank 1 comes to its backward only after the timeout of the group. Returns the errors of what reads the state, one after another."""
    training = Training(rank, ALL, process_group=dist.new_group([0, 1], timeout=timedelta(seconds=2)))
    training.steps(range(2))
    if rank == 1:
        time.sleep(4)
        return []
    training.steps([2])
    found = []
    reads = [lambda: dct_compile.state_dict(training.module), lambda: dct_compile.drain(training.module)]
    for read in [*reads, lambda: training.steps([3]), reads[0]]:
        try:
            read()
            found.append("")
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_the_error_of_an_exchange_is_raised_until_a_backward_has_raised_it(ranks2: Ranks) -> None:
    saved, drain, backward, after = ranks2(failing)[0]
    assert "Timed out" in saved or "closure" in saved
    assert saved == drain == backward
    assert after == ""


def reported(rank: int, world_size: int, settings: dict[str, Any]) -> list[str]:
    module = wrap(Net(), LATE, **settings)
    loss_of(module(batch(rank, 0))).backward()
    return [site.reason for site in dct_compile.report().sites if site.kind == "gradient"]


@pytest.mark.parametrize(("settings", "reason"), [({}, Reason.LATE), ({"find_unused_parameters": True}, Reason.NOW_UNUSED)], ids=str)
def test_the_report_tells_when_a_gradient_arrives(ranks2: Ranks, settings: dict[str, Any], reason: Reason) -> None:
    (found,) = ranks2(reported, settings)[0]
    assert found.startswith("gather, density 0.05; dense: ")
    assert found.endswith(reason.removeprefix("{reason}"))


def test_ranks_need_the_same_arrival(ranks2: Ranks) -> None:
    for error in ranks2(differing):
        assert "option 'arrival' is " in error


def differing(rank: int, world_size: int) -> str:
    module: DistributedDataParallel = wrap(Net(), LATE if rank == 0 else {"dp_density": 0.05})
    try:
        loss_of(module(batch(rank, 0))).backward()
    except RuntimeError as error:
        return str(error)
    return ""
