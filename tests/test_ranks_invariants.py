"""The invariants of DCT-DP at every step of trainings under DDP, over gloo ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.ranks import digest, fresh_compiler, run_ranks
from tests.ranks_audit import Auditor
from tests.ranks_ddp import Net, batch, ddp_of, loss_of, reasons, train


def invariants(rank: int, world_size: int, steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    variants = [
        ("gather", "float32", torch.float32),
        ("gather", "bfloat16", torch.float32),
        ("owner", "bfloat16", torch.float32),
        ("owner", "float16", torch.float32),
        ("gather", "float16", torch.float32),
        ("gather", "bfloat16", torch.bfloat16),
    ]
    for scheme, value_dtype, dtype in variants:
        with fresh_compiler():
            options = {"dp_density": 0.05, "dp_value_dtype": value_dtype, "all_reduce": scheme, "refresh_interval": 4}
            module, compiled = ddp_of(Net().to(dtype), options, inside=scheme == "owner")
            auditor = Auditor(module, 0.05, getattr(torch, value_dtype))
            digests = train(module, compiled, rank, range(steps), auditor)
            auditor.finish()
            counted = [entry["counters"].tolist() for entry in dct_compile.state_dict(module).values()]
            results[f"{scheme} {value_dtype} {dtype}"] = digests, reasons(), auditor.compressed, counted
    return results


@pytest.mark.distributed
def test_the_invariants_hold_at_every_step_of_a_training() -> None:
    first, second = run_ranks(invariants, 2, 20)
    for name, (digests, decisions, compressed, counted) in first.items():
        assert digests == second[name][0], f"{name}: the ranks' parameters differ"
        assert len(set(digests)) == 20
        assert {decision for decision, _ in decisions} == {"compressed"}
        assert compressed == {"bottom.weight", "middle.weight", "top.weight", "side.weight"}
        assert {step for step, *_ in counted} == {20}
    plain = [result[0][-1] for result in first.values()]
    assert len(set(plain)) == len(plain), "every variant rounds or selects differently"


def unused_at_times(rank: int, world_size: int) -> None:
    for scheme in ("gather", "owner"):
        with fresh_compiler():
            module, compiled = ddp_of(Net(), {"dp_density": 0.05, "all_reduce": scheme}, inside=True, find_unused_parameters=True)
            auditor = Auditor(module, 0.05, torch.bfloat16)
            train(module, compiled, rank, range(6), auditor, arguments=lambda step: (step % 2 == 0,))
            auditor.finish()


@pytest.mark.distributed
def test_a_step_in_which_no_rank_uses_a_parameter_loses_none_of_its_residual() -> None:
    """DDP throws the result of such a step away: what was sent then would be lost."""
    run_ranks(unused_at_times, 2)


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


def stacked(rank: int, world_size: int) -> dict[str, Any]:
    mp_rank = rank % 2
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = Hybrid(mp_rank)
    experts, others = (["expert.weight", "expert.bias"], ["shared.weight", "shared.bias"])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    inner = DistributedDataParallel(model, process_group=groups[mp_rank])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, [f"module.{name}" for name in experts])
    outer = DistributedDataParallel(inner)
    compiled = torch.compile(outer, backend=dct, options={"dp_density": 0.05, "all_reduce": "owner"})
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
    sites = [(site.group_size, site.name, site.decision) for site in dct_compile.report().sites if site.kind == "gradient"]
    return {"digests": digests, "state": sorted(dct_compile.state_dict(outer)), "sites": sites}


@pytest.mark.distributed
def test_stacked_ddps_average_over_two_groups() -> None:
    results = run_ranks(stacked, 4)
    for rank, result in enumerate(results):
        assert [shared for shared, _ in result["digests"]] == [shared for shared, _ in results[0]["digests"]]
        assert result["digests"] == results[(rank + 2) % 4]["digests"]
        assert result["state"] == ["expert.weight", "shared.weight"]
        assert {(size, decision) for size, _, decision in result["sites"]} == {(4, "compressed"), (2, "compressed")}
    assert results[0]["digests"][-1][1] != results[1]["digests"][-1][1]
