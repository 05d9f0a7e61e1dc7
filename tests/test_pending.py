"""Exchanges that may still be taken back: what a step, ``zero_grad``, and a gradient scaler do to them."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dct_compile.state.gradient_use import GradientUse
from dct_compile.state.pending import Pending
from dct_compile.state.spec import StateSpec, StateTensor, counters_of, residual_of

PARTS = ((0, 2), (2, 5))
SPEC = StateSpec((2, 3), (residual_of(PARTS), StateTensor("threshold", (2,), torch.float32, (0, 1)), counters_of(2)))


class Bucket:
    """A bucket of two parameters whose exchanges add their gradients to the residual."""

    def __init__(self) -> None:
        self.use = GradientUse()
        self.parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
        self.tensors = {item.input_name: torch.zeros(item.shape, dtype=item.dtype) for item in SPEC.tensors}
        self.pending = Pending(self.tensors, SPEC, self.use.of(self.parameters))

    def exchange(self, value: float, keep: bool = True) -> bool:
        """Begins a backward that adds ``value`` to each gradient, and sends nothing of it. Returns the answer of ``begin``."""
        self.use.look(self.parameters)
        certain = self.pending.begin(keep)
        self.tensors["residual"] += value
        self.tensors["threshold"] += value
        self.tensors["counters"] += 1
        for parameter in self.parameters:
            gradient = torch.full_like(parameter, value)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return certain

    def settled(self) -> list[float]:
        """Returns the residual after all that is known now."""
        self.use.look(self.parameters)
        self.pending.settle()
        return self.tensors["residual"].tolist()


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("to_none", [True, False])
def test_a_discarded_gradient_leaves_residual_threshold_and_counters(to_none: bool) -> None:
    bucket = Bucket()
    optimizer = sgd(bucket.parameters)
    bucket.exchange(1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    bucket.exchange(2.0)
    optimizer.zero_grad(set_to_none=to_none)
    assert bucket.settled() == [1.0] * 5
    assert bucket.tensors["threshold"].tolist() == [1.0] * 2
    assert bucket.tensors["counters"].tolist() == [[1] * 5] * 2
    bucket.exchange(4.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    assert bucket.settled() == [5.0] * 5


def test_gradients_that_are_accumulated_stay() -> None:
    bucket = Bucket()
    optimizer = sgd(bucket.parameters)
    for value in (1.0, 2.0):
        bucket.exchange(value)
    assert bucket.settled() == [3.0] * 5
    optimizer.zero_grad()
    assert bucket.settled() == [0.0] * 5


def test_each_parameter_has_its_own_fate() -> None:
    bucket = Bucket()
    first, second = (sgd([parameter]) for parameter in bucket.parameters)
    bucket.exchange(1.0)
    first.step()
    first.zero_grad()
    second.zero_grad()
    assert bucket.settled() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert bucket.tensors["threshold"].tolist() == [1.0, 0.0]


def test_a_closure_discards_the_gradient_of_before() -> None:
    bucket = Bucket()
    optimizer = sgd(bucket.parameters)

    def closure() -> float:
        optimizer.zero_grad()
        bucket.exchange(2.0)
        return 0.0

    bucket.exchange(1.0)
    optimizer.step(closure)
    optimizer.zero_grad()
    assert bucket.settled() == [2.0] * 5


def test_an_optimizer_that_drops_gradients_in_its_step_has_applied_them() -> None:
    class Dropping(torch.optim.SGD):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            super().step()
            self.zero_grad()

    bucket = Bucket()
    optimizer = Dropping(bucket.parameters, lr=0.0)
    bucket.exchange(1.0)
    optimizer.step()
    assert bucket.settled() == [1.0] * 5


def test_without_an_optimizer_a_gradient_counts_as_applied() -> None:
    bucket = Bucket()
    gc.collect()
    assert bucket.exchange(1.0)
    bucket.parameters[0].grad = bucket.parameters[1].grad = None
    assert not bucket.exchange(2.0)
    assert bucket.tensors["residual"].tolist() == [3.0] * 5


def test_a_parameter_that_was_written_to_was_stepped_by_hand() -> None:
    bucket = Bucket()
    gc.collect()
    for value in (1.0, 2.0):
        assert bucket.exchange(value)
        with torch.no_grad():
            for parameter in bucket.parameters:
                parameter.sub_(0.1)
                parameter.grad = None
    assert bucket.tensors["residual"].tolist() == [3.0] * 5


def test_an_optimizer_that_is_made_late_is_found() -> None:
    bucket = Bucket()
    bucket.exchange(1.0)
    optimizer = sgd(bucket.parameters)
    optimizer.zero_grad()
    assert bucket.settled() == [0.0] * 5


def test_discarding_by_hand_needs_no_optimizer() -> None:
    bucket = Bucket()
    bucket.exchange(1.0)
    bucket.pending.discard([1])
    assert bucket.tensors["residual"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_discarding_by_hand_needs_the_state_of_before() -> None:
    bucket = Bucket()
    bucket.exchange(1.0, keep=False)
    with pytest.raises(RuntimeError, match="option 'undo_discarded' is False"):
        bucket.pending.discard([0])


def test_a_flag_on_the_device_decides_as_one_on_the_host() -> None:
    bucket = Bucket()
    bucket.exchange(1.0)
    sgd(bucket.parameters).step()
    bucket.exchange(2.0)
    for use, flag in zip(bucket.pending.uses, (True, False), strict=True):
        use.absent = torch.tensor(flag)
    bucket.pending.settle()
    assert bucket.tensors["residual"].tolist() == [1.0, 1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(("found", "left"), [(0.0, 3.0), (1.0, 1.0)])
def test_a_fused_optimizer_may_leave_out_its_step(found: float, left: float) -> None:
    bucket = Bucket()
    optimizer = torch.optim.SGD(bucket.parameters, lr=0.0, fused=True)
    for value in (1.0, 2.0):
        bucket.exchange(value)
        if value == 2.0:
            optimizer.found_inf = torch.tensor([found])  # type: ignore[attr-defined]  # as GradScaler.step does
        optimizer.step()
        optimizer.zero_grad()
    assert bucket.settled() == [left] * 5


def backward(bucket: Bucket, value: float, scaler: torch.amp.GradScaler | None) -> None:
    """Exchanges gradients of ``value`` in the backward of a loss that ``scaler`` has scaled."""
    loss = torch.zeros((), requires_grad=True)
    loss.register_hook(lambda _: bucket.exchange(value) and None)
    (scaler.scale(2 * loss) if scaler is not None else 2 * loss).backward()  # type: ignore[no-untyped-call]


def scaled_step(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, bucket: Bucket) -> None:
    backward(bucket, 1.0, scaler)
    scaler.step(optimizer)
    optimizer.zero_grad()


def test_what_waits_follows_the_loss_scale() -> None:
    bucket = Bucket()
    optimizer, scaler = sgd(bucket.parameters), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_step(scaler, optimizer, bucket)
    scaler.update(2.0)
    scaled_step(scaler, optimizer, bucket)
    assert bucket.tensors["residual"].tolist() == [1.0 / 4 + 1.0] * 5
    assert bucket.tensors["threshold"].tolist() == [1.0 / 4 + 1.0] * 2
    bucket.pending.rescale_to(1.0)
    assert bucket.tensors["residual"].tolist() == [(1.0 / 4 + 1.0) / 2] * 5


def test_what_is_restored_follows_the_loss_scale_too() -> None:
    bucket = Bucket()
    optimizer, scaler = sgd(bucket.parameters), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled_step(scaler, optimizer, bucket)
    backward(bucket, 5.0, scaler)
    optimizer.zero_grad()
    scaler.update(2.0)
    scaled_step(scaler, optimizer, bucket)
    assert bucket.tensors["residual"].tolist() == [1.0 / 4 + 1.0] * 5


@pytest.mark.parametrize("first", [None, 8.0, 4.0])
@pytest.mark.parametrize("then", [None, 8.0, 4.0])
def test_what_waits_follows_another_scaler(first: float | None, then: float | None) -> None:
    """Two phases of a training with a scaler each, or without one. Another model has a scaler, too."""
    other = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    other.scale(torch.zeros(()))
    bucket = Bucket()
    for phase in (first, then):
        optimizer, scaler = sgd(bucket.parameters), torch.amp.GradScaler("cpu", init_scale=phase) if phase is not None else None
        for _ in range(2):
            backward(bucket, phase or 1.0, scaler)
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update(phase)
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert bucket.tensors["residual"].tolist() == [4 * (then or 1.0)] * 5
