"""Averaging inside of the compiled graph (option ``data_parallel``), and the start that it makes equal."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests import ranks_ddp
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_stack import batch, stack

pytestmark = pytest.mark.distributed

SCHEMES = ("gather", "owner")
SEEDS = {"ddp": (0, 0), "whole": (0, 1), "blocks": (0, 1)}
"""Of the parameters of each rank: only rank 0's are the same in all."""


class Outcome(NamedTuple):
    """``digests``: of gradients and parameters at every step. ``residuals``: a digest of each. ``sites``: kinds and decisions."""

    digests: list[tuple[str, str]]
    sites: set[tuple[str, str]]
    graphs: int
    residuals: list[str]


def train(model: nn.Module, compiled: Any, rank: int, steps: int = 5) -> list[tuple[str, str]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    digests = []
    for step in range(steps):
        compiled(batch(rank, step)).square().mean().backward()
        gradients = digest(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        digests.append((gradients, digest(model.parameters())))
    return digests


def residuals_of(model: nn.Module) -> list[str]:
    return [digest([entry["residual"]]) for entry in dct_compile.state_dict(model).values()]


def outcome(model: nn.Module, digests: list[tuple[str, str]]) -> Outcome:
    report = dct_compile.report()
    return Outcome(digests, {(site.kind, site.decision) for site in report.sites}, len(report.graphs), residuals_of(model))


def averaged(rank: int, world_size: int, scheme: str, how: str) -> Outcome:
    """Trains, averaged by DDP, in the graph of the whole model, or in that of each block over a group that is named."""
    options = {"dp_density": 0.05, "gradient_scheme": scheme}
    model = stack(SEEDS[how][rank])
    compiled: Any = model
    if how == "ddp":
        compiled = torch.compile(DistributedDataParallel(model), backend=dct, options=options)
    elif how == "whole":
        compiled = torch.compile(model, backend=dct, options={**options, "data_parallel": True})
    else:
        pair = dist.new_group([0, 1])
        for block in model:
            block.compile(backend=dct, options={**options, "data_parallel": pair})
    return outcome(model, train(model, compiled, rank))


@pytest.mark.parametrize("how", SEEDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_stay_equal(ranks2_once: Ranks, scheme: str, how: str) -> None:
    first, second = ranks2_once(averaged, scheme, how)
    assert first.digests == second.digests


@pytest.mark.parametrize("how", SEEDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_compressed(ranks2_once: Ranks, scheme: str, how: str) -> None:
    assert ranks2_once(averaged, scheme, how)[0].sites == {("gradient", "compressed")}


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_graph_averaging_equals_ddp(ranks2_once: Ranks, scheme: str, how: str) -> None:
    assert ranks2_once(averaged, scheme, how)[0].digests == ranks2_once(averaged, scheme, "ddp")[0].digests


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_of_the_same_code_are_compiled_once(ranks2_once: Ranks, scheme: str) -> None:
    assert ranks2_once(averaged, scheme, "blocks")[0].graphs <= 2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_that_share_a_graph_share_no_residual(ranks2_once: Ranks, scheme: str) -> None:
    assert len(set(ranks2_once(averaged, scheme, "blocks")[0].residuals)) == 3


def evaluated(rank: int, world_size: int, scheme: str) -> tuple[list[str], list[str]]:
    """Returns the residuals after training, and after an evaluation: its graph has no backward, so nothing to average."""
    model = stack(seed=0)
    for block in model:
        block.compile(backend=dct, options={"dp_density": 0.05, "gradient_scheme": scheme, "data_parallel": True})
    train(model, model, rank, steps=2)
    before = residuals_of(model)
    model.eval()
    with torch.no_grad():
        model(batch(rank, 0))
    return before, residuals_of(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_evaluation_touches_no_state(ranks2: Ranks, scheme: str) -> None:
    for before, after in ranks2(evaluated, scheme):
        assert len(before) == 3
        assert before == after


def dense(rank: int, world_size: int, how: str) -> Outcome:
    """Trains, averaged by DDP under backend "inductor" or under density 1, or in the graph under density 1."""
    model = stack(seed=rank if how == "data_parallel" else 0)
    if how == "data_parallel":
        compiled: Any = torch.compile(model, backend=dct, options={"dp_density": 1, "data_parallel": True})
    elif how == "ddp":
        compiled = torch.compile(DistributedDataParallel(model), backend=dct, options={"dp_density": 1, "mp_density": 1})
    else:
        compiled = torch.compile(DistributedDataParallel(model), backend="inductor")
    return outcome(model, train(model, compiled, rank))


@pytest.mark.parametrize("how", ["ddp", "data_parallel"])
def test_density_1_is_what_inductor_computes(ranks2_once: Ranks, how: str) -> None:
    first, second = ranks2_once(dense, how)
    assert first.digests == second.digests == ranks2_once(dense, "inductor")[0].digests
    assert first.sites == {("gradient", "dense")}


def test_inductors_own_ranks_are_equal(ranks2_once: Ranks) -> None:
    first, second = ranks2_once(dense, "inductor")
    assert first.digests == second.digests


def averaged_twice(rank: int, world_size: int, inside: bool) -> str:
    model = stack(seed=0)
    options = {"data_parallel": True}
    try:
        if inside:
            DistributedDataParallel(torch.compile(model, backend=dct, options=options))(batch(rank, 0))
        else:
            torch.compile(DistributedDataParallel(model), backend=dct, options=options)(batch(rank, 0))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return repr(error.inner_exception)
    return "no error"


@pytest.mark.parametrize("inside", [True, False])
def test_averaging_in_the_graph_and_by_ddp_is_an_error(ranks2: Ranks, inside: bool) -> None:
    for error in ranks2(averaged_twice, inside):
        assert error.startswith("ValueError")
        assert "data_parallel" in error


def generated(rank: int, world_size: int, fallback: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """Returns parameters and residuals after a training, and the number of sites that were compressed."""
    options = {"dp_density": 0.05, "mp_density": 0.25, "gradient_scheme": "owner", "data_parallel": True}
    with torch._inductor.config.patch(fallback_by_default=fallback):
        model = ranks_ddp.Exchanging()
        ranks_ddp.train(model, torch.compile(model, backend=dct, options=options), rank, range(5))
        residuals = [entry["residual"] for entry in dct_compile.state_dict(model).values()]
        compressed = sum(site.decision == "compressed" for site in dct_compile.report().sites)
        return [parameter.detach() for parameter in model.parameters()], residuals, compressed


def test_inductors_generated_code_computes_the_same(ranks2: Ranks) -> None:
    """Buffers are reused and operators reordered around the mutated state; everywhere else these tests do without generated code."""
    for expected, got in zip(ranks2(generated, True), ranks2(generated, False), strict=True):
        assert expected[2] == got[2] == 3
        assert len(expected[1]) == 2
        torch.testing.assert_close(got[:2], expected[:2])
