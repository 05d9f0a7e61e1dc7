"""Patterns of options that match nothing are named, in whichever graph or wrapper the others are."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks_ddp import Exchanging, Options, batch, loss_of

pytestmark = pytest.mark.distributed

OPTIONS: Options = {
    "parameter_densities": {"bottom.weight": 0.1, "top.*": 0.1, "middle.*": 0.2},
    "exempt": ["*.bias", "ranks_ddp.py:*", "*.bais", "test_*.py:*"],
}
UNMATCHED = [
    "patterns of parameter_densities that match nothing on this rank so far: 'middle.*'",
    "patterns of exempt that match nothing on this rank so far: '*.bais', 'test_*.py:*'",
]


class Broken(Exchanging):
    """Two graphs, each of which sees one of the layers."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bottom(x))
        torch._dynamo.graph_break()
        return self.top(h)


def model_of(net: nn.Module, wrapping: str, options: Options) -> nn.Module:
    if wrapping == "inside":
        return DistributedDataParallel(torch.compile(net, backend=dct, options=options))
    if wrapping == "outside":
        return torch.compile(DistributedDataParallel(net), backend=dct, options=options)
    return torch.compile(net, backend=dct, options={**options, "data_parallel": True})


def noted(rank: int, world_size: int, net: type[nn.Module], wrapping: str) -> list[str]:
    model = model_of(net(), wrapping, OPTIONS)
    loss_of(model(batch(rank, 0))).backward()
    return [note for note in dct_compile.report().notes if note.startswith("patterns")]


@pytest.mark.parametrize("wrapping", ["inside", "outside", "data_parallel"])
def test_patterns_without_a_match_are_named(ranks2: Ranks, wrapping: str) -> None:
    assert ranks2(noted, Exchanging, wrapping) == [UNMATCHED] * 2


def test_parameters_of_all_graphs_count(ranks2: Ranks) -> None:
    """Here no exchange has a source line, so no pattern of one matches."""
    exempt = "patterns of exempt that match nothing on this rank so far: 'ranks_ddp.py:*', '*.bais', 'test_*.py:*'"
    assert ranks2(noted, Broken, "data_parallel") == [[UNMATCHED[0], exempt]] * 2


class Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(x)


def noted_of_two(rank: int, world_size: int) -> list[str]:
    models = [model_of(net, "outside", OPTIONS) for net in (Exchanging(), Middle())]
    for model in models:
        loss_of(model(batch(rank, 0))).backward()
    return [note for note in dct_compile.report().notes if note.startswith("patterns")]


def test_models_that_share_their_options(ranks2: Ranks) -> None:
    """A pattern is meant for one of them."""
    assert ranks2(noted_of_two) == [UNMATCHED[1:]] * 2
