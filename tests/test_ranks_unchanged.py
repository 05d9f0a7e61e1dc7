"""Collectives of every kind over gloo ranks: what must stay as backend "inductor" computes it, and what may change."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from dct_compile.report import SiteReport
from tests.rank_pool import Ranks
from tests.ranks import exchanged
from tests.small_models import all_reduce, exchange, gather, reduce_scatter

pytestmark = pytest.mark.distributed

STEPS = 3
BACKENDS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "whole": {"backend": dct, "options": {"mp_density": 1, "embedding_codec": "dense", "mp_value_dtype": "float32"}},
    "masked": {"backend": dct, "options": {"mp_eval": False}},
}


class Everything(nn.Module):
    """Collectives of every kind, some of them on types that are never compressed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bottom, self.top = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = all_reduce(ids)
        mean = all_reduce(ids.double().reshape(-1, 8).sqrt())
        everywhere = funcol.all_gather_tensor(ids, 0, dist.group.WORLD)
        h = torch.relu(self.bottom(exchange(self.table(ids))))
        h = all_reduce(reduce_scatter(gather(exchange(h))))
        return self.top(h), mean, count + everywhere[: ids.shape[0]]


class Outcome(NamedTuple):
    """``outputs``: three of each step: prediction, float64, int64. ``evaluated``: the prediction without a gradient."""

    outputs: list[Tensor]
    parameters: list[Tensor]
    evaluated: Tensor
    sites: tuple[SiteReport, ...]
    sites_in_evaluation: tuple[SiteReport, ...]


def trained(rank: int, world_size: int, name: str) -> Outcome:
    ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(rank))
    model = Everything()
    compiled = torch.compile(model, **BACKENDS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(STEPS):
        prediction, mean, count = compiled(ids)
        prediction.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs += [prediction.detach(), mean, count]
    sites = dct_compile.report().sites
    dct_compile.reset_report()
    with torch.no_grad():
        model.eval()
        evaluated = compiled(ids)[0]
    return Outcome(outputs, [p.detach() for p in model.parameters()], evaluated, sites, dct_compile.report().sites)


def test_density_1_equals_inductor(ranks2_once: Ranks) -> None:
    for expected, got in zip(ranks2_once(trained, "inductor"), ranks2_once(trained, "whole"), strict=True):
        for position, (reference, tensor) in enumerate(zip(expected.outputs, got.outputs, strict=True)):
            assert torch.equal(reference, tensor), f"output {position} differs"
        assert all(torch.equal(reference, tensor) for reference, tensor in zip(expected.parameters, got.parameters, strict=True))
        assert torch.equal(expected.evaluated, got.evaluated)


def test_density_1_is_reported_as_dense(ranks2_once: Ranks) -> None:
    for result in ranks2_once(trained, "whole"):
        assert {site.decision for site in result.sites} == {"dense"}
        assert {site.decision for site in result.sites_in_evaluation} == {"dense"}


def test_only_floating_point_messages_change(ranks2_once: Ranks) -> None:
    for expected, got in zip(ranks2_once(trained, "inductor"), ranks2_once(trained, "masked"), strict=True):
        same = [torch.equal(reference, tensor) for reference, tensor in zip(expected.outputs, got.outputs, strict=True)]
        assert same == [False, True, True] * STEPS


def test_types_that_are_not_compressed_are_named(ranks2_once: Ranks) -> None:
    for result in ranks2_once(trained, "masked"):
        dense = {site.dtype: site.reason for site in result.sites if site.decision == "dense"}
        assert set(dense) == {"int64", "float64"}
        assert all("is not compressed" in reason for reason in dense.values())
        assert {site.dtype for site in result.sites if site.decision == "compressed"} == {"float32"}


def test_evaluation_is_dense_where_the_option_says_so(ranks2_once: Ranks) -> None:
    for result in ranks2_once(trained, "masked"):
        assert {site.decision for site in result.sites_in_evaluation} == {"dense"}


def averaged(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Returns an average that is scattered, got and expected. It has no backward in torch, so it is met in evaluation only."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))

    def average(x: Tensor) -> Tensor:
        return funcol.reduce_scatter_tensor(x * 1, "avg", 0, dist.group.WORLD)

    with torch.no_grad():
        options = {"activation_codec": "threshold", "mp_density": 0.25, "mp_value_dtype": "float32", "mp_outputs": True}
        got = torch.compile(average, backend=dct, options=options)(x)
        smallest = x.abs().topk(16, dim=1).values[:, -1:]
        masked = exchanged(torch.where(x.abs() >= smallest, x, 0))
        return got, masked.reshape(2, 4, 64).sum(0) / 2


def test_an_average_is_that_of_the_masked_rows(ranks2: Ranks) -> None:
    for got, expected in ranks2(averaged):
        assert torch.equal(got, expected)
