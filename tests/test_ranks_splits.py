"""Rows that each rank sends to each other one: they may change from call to call and be zero, over gloo ranks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.row_mask import masked

pytestmark = pytest.mark.distributed

WIDTH = 64
DENSITY = 0.1
TABLES = [
    [[2, 3, 4], [4, 2, 3], [5, 6, 2]],
    [[3, 4, 5], [2, 7, 4], [2, 4, 6]],
    [[6, 2, 4], [3, 3, 2], [4, 5, 7]],
    [[0, 5, 2], [3, 0, 4], [2, 0, 3]],
]
"""Rows by step, sender and receiver."""


class Uneven(nn.Module):
    """Splits are lists, or tensors: then only the data know them."""

    def __init__(self, mask: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.top, self.mask = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 4), mask

    def forward(self, x: Tensor, received: list[int] | Tensor, sent: list[int] | Tensor) -> Tensor:
        h = torch.relu(self.bottom(x))
        h = self.mask(h) if self.mask is not None else h
        if isinstance(received, Tensor):
            received, sent = received.tolist(), sent.tolist()
            for size in (*received, *sent):
                torch._check(size >= 0)
                torch._check(size <= 100)
        exchanged = funcol.all_to_all_single_autograd(h, received, sent, dist.group.WORLD)
        # The backward of the views asks how many rows arrived, which is not always known when the graph is made.
        return self.top(exchanged.view(-1, 2, WIDTH // 2).sin().view(-1, WIDTH))


class Outcome(NamedTuple):
    """``steps``: expected and got output and gradients. ``graphs``: compiled after each step."""

    steps: list[tuple[list[Tensor], list[Tensor]]]
    graphs: list[int]
    decisions: set[str]


def changing(rank: int, world_size: int, by_tensor: bool) -> Outcome:
    model, reference = Uneven(), Uneven(partial(masked, density=DENSITY))
    counters.clear()
    steps, graphs = [], []
    with torch._dynamo.config.patch(capture_scalar_outputs=by_tensor):
        options = {"mp_density": DENSITY, "mp_value_dtype": "float32"}
        compiled = torch.compile(model, backend=dct, options=options, dynamic=True if by_tensor else None)
        for step, table in enumerate(TABLES):
            splits: list[Any] = [[row[rank] for row in table], table[rank]]
            x = torch.randn(sum(table[rank]), 16, generator=torch.Generator().manual_seed(10 * step + rank))
            if by_tensor:
                splits = [torch.tensor(sizes) for sizes in splits]
            steps.append((run(reference, reference, x, splits), run(compiled, model, x, splits)))
            graphs.append(counters["stats"]["unique_graphs"])
    return Outcome(steps, graphs, {site.decision for site in dct_compile.report().sites})


def run(module: Any, model: nn.Module, x: Tensor, splits: list[Any]) -> list[Tensor]:
    """Returns output, gradient of the input, and gradients of the parameters that have one."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    output = module(leaf, *splits)
    output.square().sum().backward()
    return [output.detach(), leaf.grad, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.fixture(scope="module", params=[False, True], ids=["lists", "tensors"])
def outcomes(request: pytest.FixtureRequest, ranks3: Ranks) -> list[Outcome]:
    return ranks3(changing, request.param)


@pytest.mark.parametrize("step", range(len(TABLES)))
def test_every_step_sends_the_largest_of_each_row(outcomes: list[Outcome], step: int) -> None:
    for outcome in outcomes:
        for expected, got in zip(*outcome.steps[step], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_every_graph_is_compressed(outcomes: list[Outcome]) -> None:
    assert [outcome.decisions for outcome in outcomes] == [{"compressed"}] * 3


@pytest.mark.parametrize("outcomes", [False], indirect=True, ids=["lists"])
def test_symbolic_splits_need_no_other_graph_for_other_splits(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.graphs[2] == outcome.graphs[1]
