"""Ranks whose model has branches, loops and regions beside collectives: Inductor's code computes what eager code does."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._higher_order_ops import cond, while_loop

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.small_models import all_reduce, exchange

pytestmark = pytest.mark.distributed

region = torch.compiler.nested_compile_region(lambda x: x.cos() * 3)


class Net(nn.Module):
    """An exchange, then a branch that sums over the ranks, a region, and a loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Any:
        h = exchange(self.layer(x).relu()).sin()
        h = cond(h.sum() > -1e9, lambda h: all_reduce(h.sin()).cos(), torch.cos, (h,))
        steps = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 0.5), (torch.tensor(0), h.detach()))[1]
        return region(h) + steps


class Outcome(NamedTuple):
    """``got``, ``expected``: the result, and the averaged gradient of the weight. ``sites``: kind, decision, whether in a subgraph."""

    got: tuple[Tensor, Tensor]
    expected: tuple[Tensor, Tensor]
    sites: list[tuple[str, str, bool]]


def trained(rank: int, world_size: int) -> Outcome:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(rank))
    model, reference = Net(), Net()
    options = {"data_parallel": True, "mp_density": 1, "dp_density": 0.1, "dp_value_dtype": "float32", "gradient_scheme": "gather"}
    output = torch.compile(model, backend=dct, options=options)(x)
    output.square().mean().backward()
    expected = reference(x)
    expected.square().mean().backward()
    # What was not sent is in the residuals.
    sent, whole = model.layer.weight.grad, reference.layer.weight.grad
    assert sent is not None
    assert whole is not None
    rest = dct_compile.state_dict(model)["layer.weight"]["residual"].view_as(whole) / world_size
    for tensor in (rest, whole):
        dist.all_reduce(tensor)
    sites = [(site.kind, site.decision, "subgraph" in site.reason) for site in dct_compile.report().sites]
    return Outcome((output.detach(), sent + rest), (expected.detach(), whole / world_size), sites)


def test_values_and_gradients(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained):
        for got, expected in zip(outcome.got, outcome.expected, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_every_collective_is_in_the_report(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained):
        assert [site[:2] for site in outcome.sites if not site[2]] == [
            ("activation", "dense"),
            ("activation_gradient", "dense"),
            ("gradient", "compressed"),
        ]
        assert [site[:2] for site in outcome.sites if site[2]] == [("activation", "dense")] + [("activation_gradient", "dense")] * 2
