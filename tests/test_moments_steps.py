"""Optimizers whose second moment knows the gaps, in steps that are special: left out, after a load, in few bits, compiled."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from dct_compile.optim import LAST, last_arrivals
from dct_compile.state.gradient_use import GradientUse


def waiting(use: GradientUse, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Returns a parameter whose elements arrive late."""
    parameter = nn.Parameter(torch.linspace(-1, 1, 6).to(dtype))
    (record,) = use.of([parameter])
    record.waits, record.gap = True, float("inf")
    return parameter


def step(optimizer: Optimizer, parameter: nn.Parameter, count: int) -> None:
    """Makes step ``count``: element i arrives at every (i + 1)-th."""
    period = torch.arange(1, 7)
    parameter.grad = torch.where(count % period == 0, 0.5 * period, 0.0).to(parameter.dtype)
    optimizer.step()


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    return {name: value.clone() for name, value in optimizer.state[parameter].items()}


def test_a_step_that_is_left_out_changes_nothing(use: GradientUse) -> None:
    """A fused optimizer learns on the device that a gradient is not finite."""
    parameter = waiting(use)
    optimizer, scaler = AdamW([parameter], betas=(0.9, 0.9), fused=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    for count in range(1, 5):
        step(optimizer, parameter, count)
    before, value = state_of(optimizer, parameter), parameter.detach().clone()
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.full((6,), float("inf"))
    scaler.step(optimizer)
    scaler.update()
    for name, held in state_of(optimizer, parameter).items():
        assert torch.equal(held, before[name]), name
    assert torch.equal(parameter, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_counted_exactly(use: GradientUse, dtype: torch.dtype) -> None:
    """More of them than a bfloat16 can count."""
    parameter = waiting(use, dtype)
    optimizer = Adam([parameter], betas=(0.9, 0.9))
    for count in range(1, 302):
        step(optimizer, parameter, count)
    assert last_arrivals(optimizer.state[parameter], parameter, 0.0).tolist() == [301, 300, 300, 300, 300, 300]
    assert optimizer.state[parameter]["exp_avg_sq"].isfinite().all()
    assert parameter.isfinite().all()


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_training_goes_on_from_a_saved_state(use: GradientUse, how: dict[str, bool]) -> None:
    def train(is_saved: bool) -> Tensor:
        parameter = waiting(use)
        optimizer = Adam([parameter], lr=0.01, betas=(0.9, 0.9), **how)
        for count in range(1, 20):
            if is_saved and count == 11:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = Adam([parameter], lr=0.01, betas=(0.9, 0.9), **how)
                optimizer.load_state_dict(saved)
            step(optimizer, parameter, count)
        return parameter.detach()

    assert torch.equal(train(True), train(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_loaded_exactly(use: GradientUse, dtype: torch.dtype) -> None:
    """`load_state_dict` casts all state to the dtype of the parameter, which cannot hold these numbers."""
    parameter = waiting(use, dtype)
    optimizer = Adam([parameter], betas=(0.9, 0.9), eps=1e-3)
    for count in range(1, 4):
        step(optimizer, parameter, count)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = torch.tensor(70_001.0)
    saved["state"][0][LAST] = torch.full((6, 1), 70_001, dtype=torch.int32).view(torch.uint8)
    optimizer.load_state_dict(saved)
    for count in range(4, 8):
        step(optimizer, parameter, count)
    assert optimizer.state[parameter]["exp_avg_sq"].isfinite().all()
    assert last_arrivals(optimizer.state[parameter], parameter, 0.0).tolist() == [70_005, 70_004, 70_004, 70_002, 70_003, 70_004]
    assert parameter.isfinite().all()


def test_a_compiled_step(use: GradientUse) -> None:
    def train(is_compiled: bool) -> Tensor:
        parameter = waiting(use)
        optimizer = Adam([parameter], lr=0.01, betas=(0.9, 0.9))
        run = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for count in range(1, 6):
            parameter.grad = torch.where(count % torch.arange(1, 7) == 0, 0.5, 0.0)
            run()
        return parameter.detach()

    torch.testing.assert_close(train(True), train(False))


def test_a_second_moment_that_keeps_nothing_stays_plain(use: GradientUse) -> None:
    parameter = waiting(use)
    optimizer = Adam([parameter], betas=(0.9, 0.0))
    for count in range(1, 5):
        step(optimizer, parameter, count)
    assert parameter.isfinite().all()
    assert LAST not in optimizer.state[parameter]
