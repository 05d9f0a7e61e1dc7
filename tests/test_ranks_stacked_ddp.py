"""DDP around DDP: replicated parameters are averaged over all ranks, sharded ones over those that hold the same shard."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_audit import Auditor
from tests.ranks_ddp import batch, loss_of

pytestmark = pytest.mark.distributed


class Hybrid(nn.Module):
    """Replicated parameters and sharded ones: each model-parallel rank has other experts."""

    def __init__(self, mp_rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(16, 32)
        torch.manual_seed(1 + mp_rank)
        self.expert = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(torch.relu(self.shared(x)))


class Outcome(NamedTuple):
    """``shared``, ``expert``: digests of their parameters at every step. ``sites``: (group size, decision)."""

    shared: list[str]
    expert: list[str]
    state: list[str]
    sites: set[tuple[int, str]]


def stacked(rank: int, world_size: int) -> Outcome:
    mp_rank = rank % 2
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = Hybrid(mp_rank)
    experts, others = (["expert.weight", "expert.bias"], ["shared.weight", "shared.bias"])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    inner = DistributedDataParallel(model, process_group=groups[mp_rank])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, [f"module.{name}" for name in experts])
    outer = DistributedDataParallel(inner)
    compiled: Any = torch.compile(outer, backend=dct, options={"dp_density": 0.05, "gradient_scheme": "owner"})
    watched = Auditor(model.shared, 0.05, torch.bfloat16), Auditor(model.expert, 0.05, torch.bfloat16, groups[mp_rank])
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.5)
    digests = []
    for step in range(4):
        for auditor in watched:
            auditor.begin()
        loss_of(compiled(batch(rank, step))).backward()
        for auditor in watched:
            auditor.end()
        optimizer.step()
        optimizer.zero_grad()
        digests.append((digest(model.shared.parameters()), digest(model.expert.parameters())))
    for auditor in watched:
        auditor.finish()
    sites = {(site.group_size, site.decision) for site in dct_compile.report().sites if site.kind == "gradient"}
    return Outcome([shared for shared, _ in digests], [expert for _, expert in digests], sorted(dct_compile.state_dict(outer)), sites)


@pytest.fixture(scope="module")
def outcomes(ranks4: Ranks) -> list[Outcome]:
    return ranks4(stacked)


def test_replicated_parameters_are_equal_on_all_ranks(outcomes: list[Outcome]) -> None:
    assert all(outcome.shared == outcomes[0].shared for outcome in outcomes)


def test_sharded_parameters_are_equal_in_their_group(outcomes: list[Outcome]) -> None:
    assert outcomes[0].expert == outcomes[2].expert
    assert outcomes[1].expert == outcomes[3].expert


def test_sharded_parameters_differ_between_groups(outcomes: list[Outcome]) -> None:
    assert outcomes[0].expert[-1] != outcomes[1].expert[-1]


def test_both_groups_compress(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.sites == {(4, "compressed"), (2, "compressed")}
        assert outcome.state == ["expert.weight", "shared.weight"]
