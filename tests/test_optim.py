"""A bypassed first moment: the step comes out as that of the same optimizer without one, in every implementation."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam

from dct_compile.state.gradient_use import GradientUse

Make = Callable[..., Optimizer]
STEPS = 7
MOMENTS: dict[str, tuple[Make, Make]] = {
    "AdamW": (lambda p, **kw: AdamW(p, lr=0.01, **kw), lambda p, **kw: AdamW(p, lr=0.01, betas=(0.0, 0.999), **kw)),
    "AdamW, amsgrad": (
        lambda p, **kw: AdamW(p, lr=0.01, amsgrad=True, **kw),
        lambda p, **kw: AdamW(p, lr=0.01, amsgrad=True, betas=(0.0, 0.999), **kw),
    ),
    "Adam, decay, maximize": (
        lambda p, **kw: Adam(p, lr=0.01, weight_decay=0.1, maximize=True, **kw),
        lambda p, **kw: Adam(p, lr=0.01, weight_decay=0.1, maximize=True, betas=(0.0, 0.999), **kw),
    ),
    "SGD": (lambda p, **kw: SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1, **kw), lambda p, **kw: SGD(p, lr=0.1, weight_decay=0.1, **kw)),
    "SGD, nesterov": (lambda p, **kw: SGD(p, lr=0.01, momentum=0.9, nesterov=True, **kw), lambda p, **kw: SGD(p, lr=0.1, **kw)),
    "SGD, dampening": (lambda p, **kw: SGD(p, lr=0.01, momentum=0.9, dampening=0.5, **kw), lambda p, **kw: SGD(p, lr=0.05, **kw)),
}
WITHOUT_FUSED: dict[str, tuple[Make, Make]] = {
    "RAdam": (lambda p, **kw: RAdam(p, lr=0.01, betas=(0.9, 0.6), **kw), lambda p, **kw: RAdam(p, lr=0.01, betas=(0.0, 0.6), **kw)),
    "Adamax": (lambda p, **kw: Adamax(p, lr=0.01, **kw), lambda p, **kw: Adamax(p, lr=0.01, betas=(0.0, 0.999), **kw)),
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def parameters(use: GradientUse | None, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Returns two parameters; their gradients arrive late where ``use`` is given."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(5, generator=generator).to(dtype)) for _ in range(2)]
    for item in use.of(made) if use is not None else []:
        item.waits = True
    return made


def set_gradients(held: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    for index, parameter in enumerate(held):
        gradient = torch.randn(5, generator=torch.Generator().manual_seed(10 * step + index))
        parameter.grad = (scale * gradient).to(parameter.dtype)


def train(make: Make, held: list[nn.Parameter], steps: range = range(STEPS), **choice: Any) -> Tensor:
    """Returns the parameters after every step."""
    optimizer, seen = make(held, **choice), []
    for step in steps:
        set_gradients(held, step)
        optimizer.step()
        seen.append(torch.cat([parameter.detach().clone() for parameter in held]))
    return torch.stack(seen)


CASES = [(name, how) for name in MOMENTS for how in IMPLEMENTATIONS] + [(n, how) for n in WITHOUT_FUSED for how in ("for-loop", "foreach")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_step_is_that_without_a_first_moment(use: GradientUse, name: str, how: str, dtype: torch.dtype) -> None:
    make, without = (MOMENTS | WITHOUT_FUSED)[name]
    found = train(make, parameters(use, dtype), **IMPLEMENTATIONS[how])
    wanted = train(without, parameters(None, dtype), **IMPLEMENTATIONS[how])
    kept = train(make, parameters(None, dtype), **IMPLEMENTATIONS[how])
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert (kept - wanted).abs().max() > 0.015


@pytest.mark.parametrize("how", ["for-loop", "foreach"])
def test_nadam_applies_the_gradient_alone(use: GradientUse, how: str) -> None:
    held = parameters(use)
    optimizer = NAdam(held, lr=0.01, **IMPLEMENTATIONS[how])
    for step in range(STEPS):
        before = [parameter.detach().clone() for parameter in held]
        set_gradients(held, step)
        optimizer.step()
        for parameter, old in zip(held, before, strict=True):
            assert parameter.grad is not None
            second = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999 ** (step + 1))
            wanted = old - 0.01 * parameter.grad / (second.sqrt() + 1e-8)
            assert torch.allclose(parameter, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MOMENTS)
def test_parameters_that_do_not_wait_step_as_ever(use: GradientUse, name: str) -> None:
    make, _ = MOMENTS[name]
    held = parameters(use)
    use.of(held)[1].waits = False
    found, plain = train(make, held), train(make, parameters(None))
    assert torch.equal(found[:, 5:], plain[:, 5:])
    assert not torch.allclose(found[:, :5], plain[:, :5])


@pytest.mark.parametrize("name", ["AdamW", "SGD, nesterov"])
def test_a_closure_makes_the_gradients_first(use: GradientUse, name: str) -> None:
    make, without = MOMENTS[name]
    for as_keyword in (False, True):
        held = parameters(use)
        optimizer = make(held)
        for step in range(STEPS):

            def closure(held: list[nn.Parameter] = held, step: int = step) -> float:
                set_gradients(held, step)
                return 1.5

            assert (optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)) == 1.5
        torch.testing.assert_close(torch.cat([p.detach() for p in held]), train(without, parameters(None))[-1])


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_compiled_step(use: GradientUse, name: str) -> None:
    make, without = MOMENTS[name]
    held = parameters(use)
    optimizer = make(held)
    step = torch.compile(optimizer.step, backend="eager")
    for count in range(3):
        set_gradients(held, count)
        step()
    torch.testing.assert_close(torch.cat([p.detach() for p in held]), train(without, parameters(None))[2])


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_training_goes_on_from_a_saved_state(use: GradientUse, name: str) -> None:
    make, without = MOMENTS[name]
    held = parameters(use)
    train_first = make(held)
    for step in range(3):
        set_gradients(held, step)
        train_first.step()
    second = make(held)
    second.load_state_dict(copy.deepcopy(train_first.state_dict()))
    for step in range(3, STEPS):
        set_gradients(held, step)
        second.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in held]), train(without, parameters(None))[-1])


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_a_gradient_scaler(use: GradientUse, name: str, how: str) -> None:
    make, without = MOMENTS[name]
    held = parameters(use)
    optimizer, scaler = make(held, **IMPLEMENTATIONS[how]), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        scaler.scale(torch.zeros(()))
        set_gradients(held, step, scale=2.0**10)
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(torch.cat([p.detach() for p in held]), train(without, parameters(None), **IMPLEMENTATIONS[how])[-1])


def test_groups_schedules_and_tensor_learning_rates(use: GradientUse) -> None:
    def run(held: list[nn.Parameter], beta1: float) -> Tensor:
        groups = [{"params": held[:1], "lr": torch.tensor(0.02)}, {"params": held[1:], "betas": (beta1 / 2, 0.9)}]
        optimizer = AdamW(groups, lr=torch.tensor(0.01), betas=(beta1, 0.99), foreach=False)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for step in range(STEPS):
            set_gradients(held, step)
            optimizer.step()
            schedule.step()
        return torch.cat([parameter.detach() for parameter in held])

    torch.testing.assert_close(run(parameters(use), 0.9), run(parameters(None), 0.0))


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_second_moment_that_knows_the_gaps(use: GradientUse, how: str, decay: float) -> None:
    """Against a loop over the elements, with each element arriving at its own pace; the first step counts as any."""
    beta2, held = 0.9, parameters(use)
    for item in use.of(held):
        item.gap = float("inf")
    optimizer = Adam(held, lr=0.01, betas=(0.9, beta2), weight_decay=decay, **IMPLEMENTATIONS[how])
    expected = torch.cat([parameter.detach().clone() for parameter in held]).double()
    second, gap = torch.zeros(10, dtype=torch.float64), torch.zeros(10)
    for step in range(30):
        set_gradients(held, step)
        for index, parameter in enumerate(held):
            assert parameter.grad is not None
            parameter.grad *= (step + torch.arange(5)) % (2 * index + 3) == 0
        gradient = torch.cat([parameter.grad for parameter in held if parameter.grad is not None]).double()
        arrived = gradient != 0
        gradient = gradient + decay * expected
        optimizer.step()
        gap = gap + 1 if step else torch.ones(10)
        share = torch.where(arrived, (1 - beta2**gap) / gap, 1 - beta2)
        second = beta2 * second + share * gradient.square()
        gap = torch.where(arrived, 0, gap) if step else torch.zeros(10)
        expected -= 0.01 * gradient / ((second / (1 - beta2 ** (step + 1))).sqrt() + 1e-8)
        found = torch.cat([parameter.detach() for parameter in held])
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_second_moment_that_looks_back_far_enough_stays_plain(use: GradientUse) -> None:
    held = parameters(use)
    for item in use.of(held):
        item.gap = 100.0
    near, far = AdamW(held[:1], betas=(0.9, 0.98)), AdamW(held[1:], betas=(0.9, 0.999))
    for step in range(3):
        set_gradients(held, step)
        near.step()
        far.step()
    assert "dct_last" in near.state[held[0]]
    assert "dct_last" not in far.state[held[1]]
