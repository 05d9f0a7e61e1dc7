"""Optimizers that are saved and loaded: a resumed training repeats the other one, whatever torch casts the state to."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from dct_compile.state.gradient_use import GradientUse
from tests.test_optim import parameters, set_gradients
from tests.test_optim_numerics import SETTINGS, at_step, flat

RESUMED = [
    (name, dtype)
    for name in ("AdamW, amsgrad", "Adam, decay", "RAdam", "Adamax", "NAdam", "SGD, nesterov, decay")
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if name != "NAdam" or dtype == torch.float32  # torch casts its mu_product
]


@pytest.mark.parametrize(("name", "dtype"), RESUMED, ids=str)
@pytest.mark.parametrize("has_gaps", [False, True])
def test_a_resumed_training_repeats_the_other_bit_for_bit(use: GradientUse, name: str, has_gaps: bool, dtype: torch.dtype) -> None:
    """Each element arrives at its own pace. At step 1000 bfloat16 knows multiples of 4 only."""
    make, options, _, _ = SETTINGS[name]
    for count in (1, 2, 10, 1000):
        one, other = parameters(use, dtype), parameters(use, dtype)
        for item in use.of([*one, *other]):
            item.gap = float("inf") if has_gaps else 0.0
        first = make(one, **options)
        at_step(first, one, count)
        arrive(first, one, range(3))
        for parameter, twin in zip(other, one, strict=True):
            parameter.data.copy_(twin)
        second = make(other, **options)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        arrive(first, one, range(3, 8))
        arrive(second, other, range(3, 8))
        assert torch.equal(flat(one), flat(other)), count


def arrive(optimizer: Optimizer, held: list[nn.Parameter], steps: range) -> None:
    """Steps with gradients of which a part arrives."""
    for step in steps:
        set_gradients(held, step)
        for parameter in held:
            assert parameter.grad is not None
            parameter.grad *= (step + torch.arange(5)) % 3 == 0
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_step_of_an_arrival_is_exact_after_a_load_into_another_dtype(use: GradientUse, dtype: torch.dtype) -> None:
    one, other = parameters(use, torch.float32), parameters(use, dtype)
    for item in use.of([*one, *other]):
        item.gap = float("inf")
    first, second = AdamW(one), AdamW(other)
    at_step(first, one, 70_001)
    arrive(first, one, range(4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    arrive(second, other, range(4, 5))
    held = [second.state[parameter]["dct_last"].view(torch.int32).flatten().tolist() for parameter in other]
    assert held == [[70_004, 70_003, 70_005, 70_004, 70_003]] * 2
