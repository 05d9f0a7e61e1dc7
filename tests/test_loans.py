"""A gradient stands in the place of a bypassed first moment that would have the same values: the steps are the same, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.optim import Adam, Adamax, AdamW, Optimizer, RAdam

from dct_compile.loans import Loans
from dct_compile.state.gradient_use import GradientUse
from tests.test_optim import IMPLEMENTATIONS, parameters, set_gradients

Make = Callable[..., Optimizer]
START = 1000
"""So many steps were made before: 0.9^1000 is 0 in every dtype."""
OPTIMIZERS: dict[str, Make] = {
    "AdamW": AdamW,
    "AdamW, amsgrad": lambda p, **kw: AdamW(p, amsgrad=True, **kw),
    "Adam": Adam,
    "RAdam": RAdam,
    "Adamax": Adamax,
}
CASES = [(name, how) for name in OPTIMIZERS for how in IMPLEMENTATIONS if how != "fused" or name.startswith("Adam")]
CASES.remove(("Adamax", "fused"))


class Watched:
    """An optimizer of two parameters after many steps. ``lent``: for each step, whether the moments were the gradients."""

    def __init__(self, use: GradientUse, make: Make, dtype: torch.dtype = torch.float32, gap: float = 0.0, **options: Any) -> None:
        self.held = parameters(use, dtype)
        for record in use.of(self.held):
            record.gap = gap
        self.optimizer = make(self.held, lr=0.01, **options)
        self.lent: list[bool] = []
        self.steps = 0
        self.step()
        for state in self.optimizer.state.values():
            state["step"].fill_(START)
        self.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: self.lent.append(self._is_lent()))

    def _is_lent(self) -> bool:
        return all(self.optimizer.state[parameter]["exp_avg"] is parameter.grad for parameter in self.held)

    def step(self, step: Callable[[], object] | None = None) -> Tensor:
        """Steps with new gradients, and returns the parameters."""
        self.steps += 1
        set_gradients(self.held, self.steps)
        (step or self.optimizer.step)()
        return torch.cat([parameter.detach() for parameter in self.held]).clone()

    def moments(self) -> list[float]:
        return torch.cat([self.optimizer.state[parameter]["exp_avg"] for parameter in self.held]).tolist()

    def gradients(self) -> list[float]:
        return torch.cat([parameter.grad for parameter in self.held if parameter.grad is not None]).tolist()


@pytest.mark.parametrize("gap", [0.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "how"), CASES)
def test_steps_are_the_same(use: GradientUse, name: str, how: str, dtype: torch.dtype, gap: float) -> None:
    choice = IMPLEMENTATIONS[how]
    lending = Watched(use, OPTIMIZERS[name], dtype, gap, **choice)
    found = [lending.step() for _ in range(5)]
    assert lending.lent == [False, True, True, True, True]
    assert lending.moments() == [0.0] * 10
    with patch.object(Loans, "lend", lambda *arguments: False):
        setting = Watched(use, OPTIMIZERS[name], dtype, gap, **choice)
        wanted = [setting.step() for _ in range(5)]
    assert setting.lent == [False] * 5
    assert setting.moments() == setting.gradients()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


UNEQUAL: dict[str, tuple[Make, dict[str, Any]]] = {
    "maximize": (AdamW, {"maximize": True}),
    "decay that joins the gradient": (Adam, {"weight_decay": 0.1}),
    "slow": (AdamW, {"betas": (0.999, 0.9999)}),
    "not mixed": (torch.optim.NAdam, {}),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_moment_that_differs_from_the_gradient_is_set(use: GradientUse, name: str) -> None:
    make, options = UNEQUAL[name]
    watched = Watched(use, make, **options)
    for _ in range(4):
        watched.step()
    assert watched.lent == [False] * 4


def test_gradients_of_a_scaled_loss_are_not_lent(use: GradientUse) -> None:
    watched = Watched(use, AdamW, fused=True)
    watched.optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]  # as a GradScaler hands it to a fused step
    for _ in range(3):
        watched.step()
    assert watched.lent == [False] * 3


def test_a_gradient_of_another_layout_is_not_lent(use: GradientUse) -> None:
    watched = Watched(use, AdamW)
    watched.step()
    for parameter in watched.held:
        assert parameter.grad is not None
        parameter.grad = torch.stack([parameter.grad, parameter.grad], 1)[:, 0]
    watched.optimizer.step()
    assert watched.lent == [False, False]


def test_a_step_that_raises_gives_the_moments_back_at_the_next_one(use: GradientUse) -> None:
    watched = Watched(use, AdamW)
    for _ in range(2):
        watched.step()
    own = [watched.optimizer.state[parameter]["exp_avg"] for parameter in watched.held]

    def fail(*_: object) -> None:
        raise RuntimeError("no step")

    handle = watched.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step"):
        watched.step()
    handle.remove()
    watched.step()
    assert all(watched.optimizer.state[parameter]["exp_avg"] is held for parameter, held in zip(watched.held, own, strict=True))


def test_a_step_as_ever_in_between_starts_without_a_first_moment(use: GradientUse) -> None:
    watched = Watched(use, AdamW)
    for _ in range(3):
        watched.step()
    records = use.of(watched.held)
    for record in records:
        record.waits = False
    watched.step()
    torch.testing.assert_close(watched.moments(), [(1 - 0.9) * value for value in watched.gradients()])
    for record in records:
        record.waits = True
    watched.step()
    assert watched.lent == [False, True, True, False, True]
    assert watched.moments() == [0.0] * 10


def test_a_compiled_step_has_its_own_moments(use: GradientUse) -> None:
    counter = CompileCounter()
    watched = Watched(use, AdamW, foreach=True)
    step = torch.compile(watched.optimizer.step, backend=counter)
    for _ in range(4):
        watched.step(step)
    assert watched.lent == [False] * 4
    assert counter.frame_count == 1


def test_a_step_that_is_compiled_later_is_compiled_twice_at_most(use: GradientUse) -> None:
    counter = CompileCounter()
    watched = Watched(use, AdamW, foreach=True)
    for _ in range(3):
        watched.step()
    step = torch.compile(watched.optimizer.step, backend=counter)
    for _ in range(5):
        watched.step(step)
    assert watched.lent[-3:] == [False] * 3
    assert counter.frame_count <= 2


def test_saved_moments_are_zero_and_a_resumed_run_goes_on_alike(use: GradientUse) -> None:
    first = Watched(use, AdamW)
    for _ in range(3):
        first.step()
    second = Watched(use, AdamW)
    for target, source in zip(second.held, first.held, strict=True):
        target.data.copy_(source.data)
    saved = copy.deepcopy(first.optimizer.state_dict())
    assert all(not state["exp_avg"].any() for state in saved["state"].values())
    second.optimizer.load_state_dict(saved)
    second.steps = first.steps
    torch.testing.assert_close([second.step() for _ in range(3)], [first.step() for _ in range(3)], rtol=0, atol=0)
