"""A bypassed first moment at any step: within rounding of the optimizer without one, for every implementation, dtype and setting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam
from torch.optim.swa_utils import SWALR, AveragedModel

from dct_compile.state.gradient_use import GradientUse
from tests.test_optim import IMPLEMENTATIONS, parameters, set_gradients

Options = dict[str, Any]
Pair = tuple[Callable[..., Optimizer], Options, Callable[..., Optimizer], Options]
B2 = 0.97
SETTINGS: dict[str, Pair] = {}
"""An optimizer, and the same without a first moment; each with its options."""


def _add(name: str, optimizer: Callable[..., Optimizer], without: Callable[..., Optimizer] | None = None, **options: Any) -> None:
    moments = {"betas": (0.9, B2), "lr": 0.05, **options}
    SETTINGS[name] = optimizer, moments, without or optimizer, {**moments, "betas": (0.0, moments["betas"][1])}


def _add_sgd(name: str, rate: float, **options: Any) -> None:
    plain = {key: value for key, value in options.items() if key in ("weight_decay", "maximize")}
    SETTINGS[name] = SGD, {"lr": 0.05, **options}, SGD, {"lr": rate, **plain}


_add("AdamW", AdamW)
_add("AdamW, decay", AdamW, weight_decay=0.1)
_add("AdamW, amsgrad", AdamW, amsgrad=True, weight_decay=0.1)
_add("AdamW, maximize", AdamW, maximize=True, weight_decay=0.1)
_add("AdamW, slow", AdamW, betas=(0.99, 0.999))
_add("Adam, decay", Adam, weight_decay=0.1)
_add("Adam, decay, maximize, amsgrad", Adam, weight_decay=0.1, maximize=True, amsgrad=True)
_add("RAdam", RAdam)
_add("RAdam, decay", RAdam, weight_decay=0.1, betas=(0.9, 0.6))
_add("RAdam, decoupled decay, maximize", RAdam, weight_decay=0.1, decoupled_weight_decay=True, maximize=True, betas=(0.9, 0.6))
_add("Adamax", Adamax)
_add("Adamax, decay, maximize", Adamax, weight_decay=0.1, maximize=True)
_add("NAdam", NAdam, Adam)
_add("NAdam, decay, maximize", NAdam, Adam, weight_decay=0.1, maximize=True)
_add("NAdam, decoupled decay", NAdam, AdamW, weight_decay=0.1)
SETTINGS["NAdam, decoupled decay"][1]["decoupled_weight_decay"] = True
_add_sgd("SGD", 0.5, momentum=0.9)
_add_sgd("SGD, decay, maximize", 0.5, momentum=0.9, weight_decay=0.1, maximize=True)
_add_sgd("SGD, dampening, decay", 0.25, momentum=0.9, dampening=0.5, weight_decay=0.1)
_add_sgd("SGD, nesterov, decay", 0.5, momentum=0.9, nesterov=True, weight_decay=0.1)
FUSED = [name for name in SETTINGS if name.split(",")[0] in ("Adam", "AdamW", "SGD")]
CASES = [(name, how) for name in SETTINGS for how in IMPLEMENTATIONS if how != "fused" or name in FUSED]


def flat(held: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach() for parameter in held])


def at_step(optimizer: Optimizer, held: list[nn.Parameter], count: int) -> None:
    """Brings ``optimizer`` before its step ``count``, with a state that knows one gradient, and the parameters as they were."""
    if count == 1:
        return
    before = flat(held).clone()
    set_gradients(held, 0)
    optimizer.step()
    for parameter, start in zip(held, before.split(5), strict=True):
        parameter.data.copy_(start)
        if "step" in optimizer.state[parameter]:
            optimizer.state[parameter]["step"].fill_(count - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "how"), CASES)
def test_any_step_is_within_rounding_of_one_without_a_first_moment(use: GradientUse, name: str, how: str, dtype: torch.dtype) -> None:
    make, options, without, plain = SETTINGS[name]
    choice, eps = IMPLEMENTATIONS[how], torch.finfo(dtype).eps
    for count in (1, 2, 10, 1000):
        found, wanted, kept = parameters(use, dtype), parameters(None, dtype), parameters(None, dtype)
        before = flat(found).clone()
        for optimizer, held in (
            (make(found, **options, **choice), found),
            (without(wanted, **plain, **choice), wanted),
            (make(kept, **options, **choice), kept),
        ):
            at_step(optimizer, held, count)
            set_gradients(held, 1)
            optimizer.step()
        ulps = 2 if isinstance(optimizer, NAdam) else 1  # it changes the parameter twice
        bound = ulps * eps * flat(wanted).abs() + 8 * eps * (flat(wanted) - before).abs()
        assert (flat(found) - flat(wanted)).abs().le(bound).all(), count
        assert count == 1 or (flat(kept) - flat(wanted)).abs().gt(bound).any(), count


@pytest.mark.parametrize("how", ["for-loop", "fused"])
def test_a_learning_rate_in_a_tensor(use: GradientUse, how: str) -> None:
    def run(held: list[nn.Parameter], beta1: float) -> Tensor:
        optimizer = AdamW(held, lr=torch.tensor(0.05), betas=(beta1, B2), **IMPLEMENTATIONS[how])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for step in range(10):
            set_gradients(held, step)
            optimizer.step()
            schedule.step()
        return flat(held)

    torch.testing.assert_close(run(parameters(use), 0.9), run(parameters(None), 0.0))


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_betas_in_tensors(use: GradientUse, beta1: float) -> None:
    def run(held: list[nn.Parameter], betas: tuple[Tensor, Tensor]) -> Tensor:
        optimizer = AdamW(held, lr=0.05, betas=betas, foreach=False)
        for step in range(5):
            set_gradients(held, step)
            optimizer.step()
        return flat(held)

    found = run(parameters(use), (torch.tensor(beta1), torch.tensor(B2)))
    torch.testing.assert_close(found, run(parameters(None), (torch.tensor(0.0), torch.tensor(B2))))


COMPILED: dict[str, tuple[str, Options]] = {
    "AdamW, foreach": ("AdamW, decay", {"foreach": True}),
    "AdamW, capturable": ("AdamW, decay", {"capturable": True}),
    "NAdam": ("NAdam", {}),
    "NAdam, capturable": ("NAdam", {"capturable": True}),
    "Adamax, capturable": ("Adamax", {"capturable": True}),
    "SGD, nesterov, decay": ("SGD, nesterov, decay", {}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_is_compiled_once(use: GradientUse, name: str) -> None:
    setting, choice = COMPILED[name]
    make, options, without, plain = SETTINGS[setting]
    found, wanted, compiled = parameters(use), parameters(None), []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    optimizer, reference = make(found, **options, **choice), without(wanted, **plain)
    step = torch.compile(optimizer.step, backend=count)
    for index in range(12):
        set_gradients(found, index)
        set_gradients(wanted, index)
        step()
        reference.step()
    torch.testing.assert_close(flat(found), flat(wanted))
    assert len(compiled) <= 3  # with and without a state, and with a step that changes


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_gradient_scaler_changes_nothing_where_gaps_are_known(use: GradientUse, how: str, decay: float) -> None:
    """One step overflows: it is left out, and leaves no trace in any moment."""

    def run(held: list[nn.Parameter], scaler: torch.amp.GradScaler | None) -> tuple[Tensor, list[Tensor]]:
        for item in use.of(held):
            item.waits, item.gap = True, float("inf")
        optimizer = Adam(held, lr=0.05, betas=(0.9, B2), weight_decay=decay, **IMPLEMENTATIONS[how])
        for step in range(12):
            factor = 1.0 if scaler is None else float(scaler.scale(torch.ones(())))
            set_gradients(held, step, scale=factor)
            for parameter in held:
                assert parameter.grad is not None
                parameter.grad *= (step + torch.arange(5)) % 4 == 0
            if scaler is None:
                if step != 5:
                    optimizer.step()
                continue
            if step == 5:
                held[0].grad[3] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        return flat(held), [optimizer.state[parameter]["exp_avg_sq"] for parameter in held]

    found, second = run(parameters(use), torch.amp.GradScaler("cpu", init_scale=2.0**10))
    wanted, wanted_second = run(parameters(use), None)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(second, wanted_second)


def test_a_momentum_that_never_ends_is_kept(use: GradientUse) -> None:
    held, plain = parameters(use), parameters(None)
    for parameters_ in (held, plain):
        optimizer = SGD(parameters_, lr=0.05, momentum=1.0)
        for step in range(3):
            set_gradients(parameters_, step)
            optimizer.step()
    assert torch.equal(flat(held), flat(plain))
    assert {item.stepped for item in use.of(held)} == {"as ever"}


def test_averaged_weights(use: GradientUse) -> None:
    """``torch.optim.swa_utils``: the average is that of parameters stepped without a first moment."""

    def run(held: list[nn.Parameter], beta1: float) -> Tensor:
        net = nn.ParameterList(held)
        averaged, optimizer = AveragedModel(net), AdamW(net.parameters(), lr=0.05, betas=(beta1, B2))
        schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
        for step in range(8):
            set_gradients(held, step)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(net)
        return flat(list(averaged.module))

    torch.testing.assert_close(run(parameters(use), 0.9), run(parameters(None), 0.0))
