"""Averaging inside of the compiled graph (option ``data_parallel``), the start it makes equal, and what a NaN does."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.ranks import digest, fresh_compiler, run_ranks


class Block(nn.Module):
    """The same code for every layer, so that Dynamo compiles it once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def stack(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), Block())


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))


def train(model: nn.Module, compiled: Any, rank: int, steps: int = 5) -> list[tuple[str, str]]:
    """Digests of gradients and parameters at every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    digests = []
    for step in range(steps):
        compiled(batch(rank, step)).square().mean().backward()
        gradients = digest(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        digests.append((gradients, digest(model.parameters())))
    return digests


def sites() -> set[tuple[str, str]]:
    return {(site.kind, site.decision) for site in dct_compile.report().sites}


def ways(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    pair = dist.new_group([0, 1])
    for scheme in ("gather", "owner"):
        options = {"dp_density": 0.05, "all_reduce": scheme}
        with fresh_compiler():
            model = stack(seed=0)
            results[f"{scheme} ddp"] = (
                train(model, torch.compile(DistributedDataParallel(model), backend=dct, options=options), rank),
                sites(),
            )
        with fresh_compiler():
            model = stack(seed=rank)  # only rank 0's parameters are those of the run above
            compiled = torch.compile(model, backend=dct, options={**options, "data_parallel": True})
            results[f"{scheme} whole"] = train(model, compiled, rank), sites()
        with fresh_compiler():
            model = stack(seed=rank)
            for block in model:
                block.compile(backend=dct, options={**options, "data_parallel": pair})
            results[f"{scheme} blocks"] = train(model, model, rank), sites()
            results[f"{scheme} graphs"] = len(dct_compile.report().graphs)
            state = dct_compile.state_dict(model)
            results[f"{scheme} residuals"] = [digest([entry["residual"]]) for entry in state.values()]
            # Evaluation compiles a graph without a backward: nothing to average, and no state is touched.
            model.eval()
            with torch.no_grad():
                model(batch(rank, 0))
            again = dct_compile.state_dict(model)
            assert [digest([entry["residual"]]) for entry in again.values()] == results[f"{scheme} residuals"]
    with fresh_compiler():
        model = stack(seed=0)
        results["dense ddp"] = train(model, torch.compile(DistributedDataParallel(model), backend="inductor"), rank), set()
    with fresh_compiler():
        model = stack(seed=0)
        compiled = torch.compile(DistributedDataParallel(model), backend=dct, options={"dp_density": 1, "mp_density": 1})
        results["density 1 ddp"] = train(model, compiled, rank), sites()
    with fresh_compiler():
        model = stack(seed=rank)
        compiled = torch.compile(model, backend=dct, options={"dp_density": 1, "data_parallel": True})
        results["density 1 data_parallel"] = train(model, compiled, rank), sites()
    for inside in (True, False):
        with fresh_compiler():
            options = {"data_parallel": True}
            model = stack(seed=0)
            try:
                if inside:
                    DistributedDataParallel(torch.compile(model, backend=dct, options=options))(batch(rank, 0))
                else:
                    torch.compile(DistributedDataParallel(model), backend=dct, options=options)(batch(rank, 0))
            except torch._dynamo.exc.BackendCompilerFailed as error:
                results[f"twice {inside}"] = repr(error.inner_exception)
    return results


@pytest.mark.distributed
def test_in_graph_averaging_equals_ddp() -> None:
    first, second = run_ranks(ways, 2)
    for name in first:
        if isinstance(first[name], tuple):
            assert first[name][0] == second[name][0], f"{name}: the ranks differ"
    for scheme in ("gather", "owner"):
        for how in ("ddp", "whole", "blocks"):
            assert first[f"{scheme} {how}"] == (first[f"{scheme} ddp"][0], {("gradient", "compressed")}), (scheme, how)
        assert len(set(first[f"{scheme} residuals"])) == 3, "layers that share a graph must not share a residual"
        assert first[f"{scheme} graphs"] <= 2, "the block was compiled once for all layers"
    for how in ("ddp", "data_parallel"):
        assert first[f"density 1 {how}"][0] == first["dense ddp"][0], f"density 1, {how}: not what backend 'inductor' computes"
        assert first[f"density 1 {how}"][1] == {("gradient", "dense")}
    for inside in (True, False):
        assert first[f"twice {inside}"].startswith("ValueError")
        assert "data_parallel" in first[f"twice {inside}"]


class Exchange(nn.Module):
    """One exchange of activations between two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.top = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(funcol.all_to_all_single_autograd(torch.relu(self.bottom(x)), None, None, dist.group.WORLD))


def generated(rank: int, world_size: int) -> list[tuple[list[Tensor], list[Tensor], int]]:
    results = []
    options = {"dp_density": 0.05, "mp_density": 0.25, "all_reduce": "owner", "data_parallel": True}
    for fallback in (True, False):
        with fresh_compiler(), torch._inductor.config.patch(fallback_by_default=fallback):
            model = Exchange()
            train(model, torch.compile(model, backend=dct, options=options), rank)
            residuals = [entry["residual"] for entry in dct_compile.state_dict(model).values()]
            compressed = sum(site.decision == "compressed" for site in dct_compile.report().sites)
            results.append(([parameter.detach() for parameter in model.parameters()], residuals, compressed))
    return results


@pytest.mark.distributed
def test_inductors_generated_code_computes_the_same() -> None:
    """Buffers are reused and operators reordered around the mutated state; everywhere else these tests do without generated code."""
    for (parameters, residuals, compressed), (generated_parameters, generated_residuals, generated_compressed) in run_ranks(generated, 2):
        assert compressed == generated_compressed == 3
        assert len(residuals) == 2
        torch.testing.assert_close(generated_parameters, parameters)
        torch.testing.assert_close(generated_residuals, residuals)


def poisoned(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for scheme in ("gather", "owner"):
        for bad in (float("nan"), float("inf")):
            for ddp in (True, False):
                with fresh_compiler():
                    model = stack(seed=0)
                    options = {"dp_density": 0.05, "all_reduce": scheme, "data_parallel": not ddp}
                    compiled = torch.compile(DistributedDataParallel(model) if ddp else model, backend=dct, options=options)
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
                    skipped = []
                    for step in range(6):
                        x = batch(rank, step)
                        if step == 3 and rank == 1:
                            x[0, 0] = bad
                        before = dct_compile.state_dict(model)
                        compiled(x).square().mean().backward()
                        finite = all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
                        if finite:
                            optimizer.step()
                        else:
                            after = dct_compile.state_dict(model)
                            # But for one rounding of gradient + residual: the gradient was added, and taken out again.
                            same = [torch.allclose(before[name]["residual"], after[name]["residual"], atol=1e-6) for name in before]
                            owners = [
                                torch.allclose(before[name]["owner"]["residual"], after[name]["owner"]["residual"], atol=1e-6)
                                for name in before
                                if "owner" in before[name]
                            ]
                            skipped.append((step, all(same), all(owners)))
                        optimizer.zero_grad()
                    clean = all(bool(entry["residual"].isfinite().all()) for entry in dct_compile.state_dict(model).values())
                    results[f"{scheme} {bad} {'ddp' if ddp else 'in graph'}"] = skipped, clean, digest(model.parameters())
    return results


@pytest.mark.distributed
def test_a_rank_with_a_nan_is_seen_by_all_and_loses_nothing() -> None:
    first, second = run_ranks(poisoned, 2)
    for name, (skipped, clean, parameters) in second.items():
        assert [step for step, *_ in skipped] == [step for step, *_ in first[name][0]] == [3], (
            f"{name}: only step 3 is not finite, on all ranks"
        )
        assert skipped == [(3, True, True)], f"{name}: the rank with the bad gradient keeps its residuals"
        assert clean
        assert first[name][1], f"{name}: a residual is not finite"
        assert parameters == first[name][2]
