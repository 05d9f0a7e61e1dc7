"""Which optimizers are known: by their class, by inheritance, inside of another one, and by declaration."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Adagrad, Adam, AdamW, Optimizer, RMSprop

from dct_compile.optim import Bypass, FirstMoment, first_moment_of, register_first_moment
from tests.exchanging import Exchanging
from tests.test_optim import STEPS, parameters, set_gradients, train


class Lion(Optimizer):
    """Applies the sign of a mean of its moment and the gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                moment = self.state[parameter].setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.add_((0.9 * moment + 0.1 * parameter.grad).sign(), alpha=-group["lr"])
                moment.lerp_(parameter.grad, 0.01)


class Wrapper(Optimizer):
    """Steps another optimizer, as SAM does."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.inner.step()


def told_of(make: Callable[[list[nn.Parameter]], Optimizer]) -> list[tuple[str, int]]:
    """Returns what is told of an optimizer in three steps: its name, and how many of two parameters it steps without a first moment."""
    use, told = Exchanging(), []
    bypass = Bypass(use, lambda optimizer, count: told.append((type(optimizer).__name__, count)))
    held = parameters(use)
    optimizer = make(held)
    for step in range(3):
        set_gradients(held, step)
        optimizer.step()
    del bypass
    return told


def test_an_unknown_first_moment_is_told_and_can_be_declared() -> None:
    assert told_of(Lion) == [("Lion", 0)]
    assert told_of(Adam) == told_of(lambda held: Wrapper(Adam(held))) == [("Adam", 2)]
    assert told_of(Adagrad) == told_of(RMSprop) == []
    assert told_of(lambda held: RMSprop(held, momentum=0.9)) == [("RMSprop", 0)]
    register_first_moment(Lion, FirstMoment("exp_avg", lambda group, state: 1.0 if state else 0.0))
    assert told_of(Lion) == [("Lion", 2)]
    use = Exchanging()
    bypass = Bypass(use, lambda optimizer, count: None)
    held = parameters(use)
    before = torch.cat([parameter.detach().clone() for parameter in held])
    train(Lion, held)
    expected = before.clone()
    for step in range(STEPS):
        set_gradients(held, step)
        expected -= 0.01 * torch.cat([parameter.grad.sign() for parameter in held if parameter.grad is not None])
    torch.testing.assert_close(torch.cat([parameter.detach() for parameter in held]), expected)
    del bypass


def test_a_class_that_inherits_a_known_step_is_known() -> None:
    class Mine(AdamW):
        pass

    class Other(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    held = parameters(None)
    assert first_moment_of(Mine(held)) is first_moment_of(Adam(held))
    assert first_moment_of(Other(held)) is None


class Rated(Optimizer):
    """Its step takes a learning rate first."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, rate: float, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=rate)
        return loss


def test_a_step_may_take_something_else_than_a_closure() -> None:
    use = Exchanging()
    bypass, held = Bypass(use, lambda optimizer, count: None), parameters(use)
    plain = parameters(None)
    set_gradients(held, 0)
    Rated(held).step(0.5)
    Rated(held).step(rate=0.5)

    def closure() -> float:
        set_gradients(held, 0)
        return 1.5

    assert Rated(held).step(0.5, closure=closure) == 1.5
    set_gradients(plain, 0)
    for parameter, other in zip(held, plain, strict=True):
        torch.testing.assert_close(parameter.detach(), other.detach() - 1.5 * other.grad)  # type: ignore[operator]
    del bypass
