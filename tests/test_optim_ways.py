"""Which way a parameter was stepped: known of every optimizer of torch, and of every parameter after every step."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from dct_compile.optim import Bypass
from dct_compile.state.gradient_use import GradientUse
from tests.test_optim import STEPS, Make, parameters, set_gradients
from tests.test_optim_known import Wrapper

DECISIONS = {
    **dict.fromkeys(("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD"), "bypass"),
    **dict.fromkeys(("ASGD", "Adadelta", "Adafactor", "Adagrad", "LBFGS", "Muon", "Rprop"), "as ever"),
    "RMSprop": "unknown optimizer RMSprop",
}
"""What becomes of each optimizer of torch. SparseAdam is not here: it takes sparse gradients, which are never compressed."""


def test_every_optimizer_of_torch_is_decided(use: GradientUse) -> None:
    found = {}
    for name in torch.optim.__all__:
        item = getattr(torch.optim, name)
        if not isinstance(item, type) or not issubclass(item, Optimizer) or name in ("Optimizer", "SparseAdam"):
            continue
        held = nn.Parameter(torch.randn(5, 5))
        (record,) = use.of([held])
        record.waits = True
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
        optimizer = item([held], **options)
        held.grad = torch.randn(5, 5)
        assert record.stepped == ""
        optimizer.step((lambda: 1.0) if name == "LBFGS" else None)
        found[name] = record.stepped
    assert found == DECISIONS


@pytest.mark.parametrize(
    ("make", "waits", "gap", "stepped"),
    [
        (AdamW, True, 0.0, "bypass"),
        (AdamW, True, 2000.0, "bypass + gaps"),
        (lambda held: AdamW(held, betas=(0.9, 0.99)), True, 100.0, "bypass"),  # 1 / (1 - 0.99) is a little less than 100 in floating point
        (lambda held: AdamW(held, betas=(0.9, 0.99)), True, 101.0, "bypass + gaps"),
        (lambda held: AdamW(held, betas=(0.0, 0.9)), True, 20.0, "gaps"),
        (lambda held: AdamW(held, betas=(0.0, 0.9)), True, 5.0, "as ever"),
        (AdamW, False, 2000.0, "as ever"),
        (lambda held: SGD(held, momentum=0.9), True, 2000.0, "bypass"),
        (SGD, True, 2000.0, "as ever"),
        (lambda held: Wrapper(AdamW(held)), True, 0.0, "bypass"),
        (RMSprop, True, 0.0, "as ever"),
        (lambda held: RMSprop(held, momentum=0.9), True, 0.0, "unknown optimizer RMSprop"),
        (lambda held: RMSprop(held, momentum=0.9), False, 0.0, "as ever"),
    ],
)
def test_it_is_known_how_a_parameter_was_stepped(use: GradientUse, make: Make, waits: bool, gap: float, stepped: str) -> None:
    held = parameters(use)
    for item in use.of(held):
        item.waits, item.gap = waits, gap
    optimizer = make(held)
    for step in range(2):  # the first step, which makes the states, and another one
        set_gradients(held, step)
        optimizer.step()
        assert [item.stepped for item in use.of(held)] == [stepped] * 2
    AdamW(held).zero_grad()
    optimizer.step()  # applies nothing
    assert [item.stepped for item in use.of(held)] == [stepped] * 2


def test_the_last_optimizer_counts(use: GradientUse) -> None:
    held = parameters(use)
    set_gradients(held, 0)
    AdamW(held).step()
    RMSprop(held, momentum=0.9).step()
    assert [item.stepped for item in use.of(held)] == ["unknown optimizer RMSprop"] * 2


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5, "weight_decay": 0.1}, {"nesterov": True}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_a_parameter_beside_one_whose_momentum_is_left_out_steps_as_ever(use: GradientUse, how: str, options: dict[str, float]) -> None:
    """The fused step wants the momenta of all parameters, or of none."""
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 30), torch.randn(4, 30)
    together = [nn.Parameter(part.clone()) for part in start]
    (record,) = use.of(together[:1])
    record.waits = True
    alone = nn.Parameter(start[1].clone())
    both = [SGD(held, lr=0.1, momentum=0.9, **{how: True}, **options) for held in (together, [alone])]
    for gradient in gradients:
        for held in (*together, alone):
            held.grad = gradient.clone()
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(together[1], alone)
    assert not torch.equal(together[0] - start[0], together[1] - start[1])


def test_a_gradient_that_was_not_exchanged_steps_as_ever() -> None:
    """Local steps in ``no_sync``, or a dense wrapper after a compressed one."""
    use = GradientUse()
    bypass, held, plain = Bypass(use, lambda optimizer, count: None), parameters(use), parameters(None)
    records = use.of(held)
    optimizer, other = AdamW(held, lr=0.01), AdamW(plain, lr=0.01)
    for step in range(STEPS):
        for item in records if step in (0, 3) else []:
            item.note_exchange()
        set_gradients(held, step)
        optimizer.step()
        assert [item.stepped for item in records] == ["bypass" if step in (0, 3) else "as ever"] * 2
        if step in (0, 3):  # the other one goes on from there
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for parameter, value in zip(plain, held, strict=True):
                parameter.data.copy_(value)
            continue
        set_gradients(plain, step)
        other.step()
        assert all(torch.equal(parameter, value) for parameter, value in zip(plain, held, strict=True))
    del bypass
