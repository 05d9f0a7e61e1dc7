"""Optimizers under DDP and data_parallel: those of compressed parameters leave their first moment out, all others step as ever."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import dct_compile
from tests.audited_models import Net
from tests.audited_trainings import Setting, loss_of
from tests.rank_pool import Ranks

pytestmark = pytest.mark.distributed
Options = dict[str, Any]
WAYS = ["inside", "outside", "data_parallel"]
BETA1, STEPS = 0.9, 5


def moments(rank: int, world_size: int, wrapping: str, options: Options, explicit: bool = False) -> dict[str, tuple[bool, bool]]:
    """Trains; returns for each parameter whether its first moment was that of the last gradient alone, and whether it was a mean."""
    torch.manual_seed(0)
    net = Net()
    setting = Setting(rank, wrapping, options)
    trainee = setting.wrap(net)
    optimizer = AdamW(net.parameters(), lr=0.01, betas=(BETA1, 0.99))
    if explicit:
        dct_compile.adapt(optimizer)
    means = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(trainee.call(setting.batch(step))).backward()
        optimizer.step()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            means[name] = means[name].lerp(parameter.grad, 1 - BETA1)
    found = {}
    for name, parameter in net.named_parameters():
        held, alone = optimizer.state[parameter]["exp_avg"], parameter.grad * (1 - BETA1**STEPS)  # type: ignore[operator]
        found[name] = close(held, alone), close(held, means[name])
    return found


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-9)


BYPASSED = {"a.weight": (True, False), "a.bias": (False, True), "b.weight": (True, False), "b.bias": (False, True)}
KEPT = dict.fromkeys(BYPASSED, (False, True))


@pytest.mark.parametrize("scheme", ["gather", "owner", "random_k"])
@pytest.mark.parametrize("wrapping", WAYS)
def test_the_first_moment_of_compressed_parameters_is_bypassed(ranks2: Ranks, wrapping: str, scheme: str) -> None:
    assert ranks2(moments, wrapping, {"gradient_scheme": scheme}) == [BYPASSED] * 2


@pytest.mark.parametrize("scheme", ["gather", "owner"])
@pytest.mark.parametrize("wrapping", WAYS)
def test_the_density_of_a_parameter_decides_about_its_first_moment(ranks2: Ranks, wrapping: str, scheme: str) -> None:
    """One waits for about a hundred steps, the other for two."""
    options = {"gradient_scheme": scheme, "parameter_densities": {"b.*": 0.5}}
    assert ranks2(moments, wrapping, options) == [{**BYPASSED, "b.weight": (False, True)}] * 2


@pytest.mark.parametrize("wrapping", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {"first_moment": "keep"},
        {"dp_density": 0.2},  # an element waits five steps only
        {"error_feedback": False},
        {"gradient_scheme": "powersgd"},
        {"dp_density": 1},
    ],
    ids=str,
)
def test_it_is_kept_elsewhere(ranks2: Ranks, wrapping: str, options: Options) -> None:
    assert ranks2(moments, wrapping, options) == [KEPT] * 2


def test_it_is_bypassed_at_any_density_where_that_is_asked_for(ranks2: Ranks) -> None:
    assert ranks2(moments, "inside", {"dp_density": 0.2, "first_moment": "bypass"}) == [BYPASSED] * 2


@pytest.mark.parametrize("wrapping", WAYS)
def test_one_optimizer_can_be_adapted(ranks2: Ranks, wrapping: str) -> None:
    assert ranks2(moments, wrapping, {"first_moment": "keep"}, True) == [BYPASSED] * 2


class Unknown(Optimizer):
    """Steps by a mean of gradients that nobody knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.01)


def notes(rank: int, world_size: int, optimizer_class: Any) -> list[str]:
    net = Net()
    setting = Setting(rank, "inside", {})
    trainee = setting.wrap(net)
    optimizer = optimizer_class(net.parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(trainee.call(setting.batch(step))).backward()
        optimizer.step()
    return [note[:41] for note in dct_compile.report().notes]


def test_the_report_says_how_parameters_are_stepped(ranks2: Ranks) -> None:
    assert ranks2(notes, Unknown) == [["the first moment of Unknown is not known,"]] * 2
    assert ranks2(notes, AdamW) == [["AdamW steps 2 compressed parameters witho"]] * 2


def test_an_unknown_optimizer_cannot_be_adapted() -> None:
    with pytest.raises(TypeError, match="the first moment of Unknown is not known; allowed are Adam"):
        dct_compile.adapt(Unknown([nn.Parameter(torch.zeros(2))]))
