"""DistributedDataParallel in training loops of other kinds: accumulation, a hook of the user's, DDP in parts of a model, overlap."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_audit import Auditor
from tests.ranks_ddp import SMALL_BUCKETS, Net, Options, Outcome, Part, batch, ddp_of, loss_of, outcome, train

pytestmark = pytest.mark.distributed

OPTIONS: Options = {"dp_density": 0.05, "dp_value_dtype": "float32"}
WEIGHTS = ["bottom.weight", "middle.weight", "side.weight", "top.weight"]


def accumulated(rank: int, world_size: int) -> Outcome:
    module, compiled = ddp_of(Net(), OPTIONS, inside=True)
    auditor = Auditor(module, 0.05, torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    digests = []
    for step in range(4):
        auditor.begin()
        with module.no_sync():
            for part in (1, 2):
                loss_of(compiled(batch(rank, 10 * step + part))).backward()
        loss_of(compiled(batch(rank, 10 * step))).backward()
        auditor.end()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(module.parameters()))
    auditor.finish()
    return outcome(module, digests)


def test_gradients_accumulated_without_synchronisation_are_compressed_once(ranks2: Ranks) -> None:
    first, second = ranks2(accumulated)
    assert first.digests == second.digests
    assert {decision for decision, _ in first.decisions} == {"compressed"}
    assert first.state == WEIGHTS


def hooked(rank: int, world_size: int) -> tuple[Outcome, int]:
    """Trains with a communication hook of the user's; also returns how often it was called."""
    calls = []

    def own_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(world_size), async_op=True).get_future().then(lambda done: done.value()[0])

    module, compiled = ddp_of(Net(), OPTIONS, inside=False)
    module.register_comm_hook(None, own_hook)
    return outcome(module, train(module, compiled, rank, range(3))), len(calls)


def test_a_hook_of_the_users_stays_in_place(ranks2: Ranks) -> None:
    (first, calls), (second, _) = ranks2(hooked)
    assert calls
    assert first.digests == second.digests
    assert first.state == []
    assert "DDP has a communication hook of its own" in [reason for _, reason in first.decisions]


def wrapped_parts(rank: int, world_size: int) -> Outcome:
    model = Net()
    model.bottom = DistributedDataParallel(Part(model.bottom))
    model.middle = DistributedDataParallel(Part(model.middle))
    for parameter in [*model.top.parameters(), *model.side.parameters()]:
        parameter.requires_grad_(False)
    return outcome(model, train(model, torch.compile(model, backend=dct, options=OPTIONS), rank, range(4)))


def test_parts_of_a_model_may_be_wrapped_each_on_its_own(ranks2: Ranks) -> None:
    first, second = ranks2(wrapped_parts)
    assert first.digests == second.digests
    assert {decision for decision, _ in first.decisions} == {"compressed"}
    assert first.state == ["bottom.linear.weight", "middle.linear.weight"]


def overlapping(rank: int, world_size: int, late: int) -> tuple[int, bool]:
    """Returns the number of buckets, and whether rank ``late`` waited in vain for the other to compute all of its gradients.

    It joins no collective before, so the other rank cannot have ended the reduction of its first bucket by then.
    """
    store, computed, starved = _get_default_store(), [], False

    def count(gradient: Tensor) -> None:
        computed.append(gradient)
        if len(computed) == len(parameters):
            store.set("computed", "all")

    with torch._dynamo.config.patch(optimize_ddp=False):
        module, compiled = ddp_of(Net(), {}, inside=True, bucket_cap_mb=SMALL_BUCKETS)
        for step in range(2):  # DDP makes its small buckets after the first step
            loss_of(compiled(batch(rank, step))).backward()
        loss = loss_of(compiled(batch(rank, 2)))
        parameters = list(module.parameters())
        if rank == late:
            try:
                store.wait(["computed"], timedelta(seconds=20))
            except dist.DistStoreError:
                starved = True
        else:
            for parameter in parameters:
                parameter.register_hook(count)
        loss.backward()
        return sum(site.kind == "gradient" for site in dct_compile.report().sites), starved


@pytest.mark.parametrize("late", [0, 1])
def test_a_bucket_does_not_block_the_backward_that_fills_the_next(ranks2: Ranks, late: int) -> None:
    for buckets, starved in ranks2(overlapping, late):
        assert buckets > 1
        assert not starved
