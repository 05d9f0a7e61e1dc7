"""Parameters in other memory formats: what waits for an element is found under that element, whoever averages the gradients."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from dct_compile.config import DCTConfig
from dct_compile.integrations.ddp import DDPIntegration
from dct_compile.runtime import RUNTIME
from dct_compile.state.entry import fold_share
from tests.rank_pool import Ranks
from tests.ranks import fresh_compiler

pytestmark = [pytest.mark.distributed, pytest.mark.parametrize("scheme", ["gather", "owner", "powersgd", "random_k"])]


class Net(nn.Module):
    """A channels_last convolution and a transposed matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.matrix = nn.Parameter(torch.randn(16, 40).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) @ self.matrix.t()


class Waiting:
    """One step after another from the same weights. ``total``: over all ranks and steps, the gradients less what was applied."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        self.model, self.rank = model, rank
        self.total = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}

    def step(self, run: Any, number: int) -> None:
        x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(10 * number + self.rank))
        plain = copy.deepcopy(self.model)
        plain(x).square().mean().backward()
        self.model.zero_grad()
        run(x).square().mean().backward()
        averaged = dict(self.model.named_parameters())
        for name, parameter in plain.named_parameters():
            gradient, mean = parameter.grad, averaged[name].grad
            assert gradient is not None
            assert mean is not None
            dist.all_reduce(gradient := gradient.contiguous())
            self.total[name] += gradient - dist.get_world_size() * mean

    def missing(self) -> float:
        """The largest difference between what waits, by the total, and the residuals of the state."""
        worst = 0.0
        for name, entry in dct_compile.state_dict(self.model).items():
            held = fold_share(entry)["residual"].clone()
            dist.all_reduce(held)
            worst = max(worst, float((held.view(self.total[name].shape) - self.total[name]).abs().max()))
        return worst


def largest_difference(ours: dict[str, Any], other: dict[str, Any]) -> float:
    """Compares what one rank holds: residuals with owned shares folded in, and factors."""
    pairs = [(fold_share(ours[name]), fold_share(other[name])) for name in ours]
    found = [(one[key] - two[key]).abs().max() for one, two in pairs for key in ("residual", "right_factor") if key in one]
    return max(map(float, found))


def handed_over(rank: int, world_size: int, scheme: str) -> dict[str, float]:
    """Takes a step under DDP and one under data_parallel; then each goes on with the state of the other."""
    options = {"gradient_scheme": scheme, "dp_density": 0.05, "dp_value_dtype": "float32"}
    with fresh_compiler():
        inside, around = Net(), Net()
        compiled = torch.compile(inside, backend=dct, options={**options, "data_parallel": True})
        ddp = DistributedDataParallel(around)
        DDPIntegration().attach(ddp, DCTConfig(**options), RUNTIME)
        found = {}
        sides = {"data_parallel": (Waiting(inside, rank), compiled), "ddp": (Waiting(around, rank), ddp)}
        for side, (waiting, run) in sides.items():
            waiting.step(run, 0)
            found[f"{side} misses"] = waiting.missing()
        states = {side: dct_compile.state_dict(waiting.model) for side, (waiting, _) in sides.items()}
        totals = {side: copy.deepcopy(waiting.total) for side, (waiting, _) in sides.items()}
        for side, other in (("data_parallel", "ddp"), ("ddp", "data_parallel")):
            waiting, run = sides[side]
            dct_compile.load_state_dict(waiting.model, states[other])
            found[f"{side} has other values than {other}"] = largest_difference(dct_compile.state_dict(waiting.model), states[other])
            waiting.total = totals[other]
            waiting.step(run, 1)
            found[f"{side} misses after {other}"] = waiting.missing()
        return found


def test_every_element_waits_in_its_own_place(ranks2_once: Ranks, scheme: str) -> None:
    for found in ranks2_once(handed_over, scheme):
        assert len(found) == 6
        assert {name: difference for name, difference in found.items() if not difference < 1e-6} == {}
