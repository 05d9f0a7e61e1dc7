"""The factor of a loss is known while its backward runs, and forgotten with it."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint

from dct_compile.state.loss_scale import LossScales, loss_scales


@pytest.fixture
def scales() -> LossScales:
    return loss_scales()


class Leaf:
    """A parameter that notes the factor of the loss whenever its gradient is made."""

    def __init__(self, scales: LossScales) -> None:
        self.parameter = torch.ones(3, requires_grad=True)
        self.seen: list[float | Tensor | None] = []
        self.parameter.register_hook(lambda _: self.seen.append(scales.present()))

    def loss(self) -> Tensor:
        return (2 * self.parameter).sum()


def scaler_of(scale: float) -> GradScaler:
    return GradScaler("cpu", init_scale=scale)


def backward(loss: Any, **options: Any) -> None:
    torch.autograd.backward(loss, **options)


WAYS: dict[str, Callable[[GradScaler, Tensor], Any]] = {
    "a tensor": lambda scaler, loss: scaler.scale(loss),
    "a list": lambda scaler, loss: scaler.scale([torch.zeros(()), loss])[1],
    "a tuple": lambda scaler, loss: scaler.scale((loss, torch.zeros(())))[0],
    "nested": lambda scaler, loss: scaler.scale([[loss]])[0][0],  # type: ignore[index, list-item]
    "an iterator": lambda scaler, loss: next(iter(scaler.scale(item for item in [loss]))),
    "divided": lambda scaler, loss: scaler.scale(loss) / 4,
    "changed in place": lambda scaler, loss: scaler.scale(loss).div_(4),
    "added": lambda scaler, loss: scaler.scale(loss) + scaler.scale(loss),
    "in a compiled function": lambda scaler, loss: torch.compile(lambda item: scaler.scale(item), backend="eager")(loss),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_scaled_loss(scales: LossScales, way: str) -> None:
    leaf = Leaf(scales)
    backward(WAYS[way](scaler_of(8.0), leaf.loss()))
    assert leaf.seen == [8.0]


def test_several_losses_of_one_backward(scales: LossScales) -> None:
    leaves = [Leaf(scales) for _ in range(2)]
    backward(scaler_of(8.0).scale([leaf.loss() for leaf in leaves]))
    assert [leaf.seen for leaf in leaves] == [[8.0], [8.0]]


def test_a_loss_that_no_scaler_has_scaled(scales: LossScales) -> None:
    leaf = Leaf(scales)
    backward(scaler_of(8.0).scale(leaf.loss()))
    backward(leaf.loss())
    backward(16 * leaf.loss())
    backward(GradScaler("cpu", enabled=False).scale(leaf.loss()))
    assert leaf.seen == [8.0, 1.0, 1.0, 1.0]
    assert scales.present() is None


def test_each_backward_has_the_factor_of_its_own_loss(scales: LossScales) -> None:
    leaf, first, second = Leaf(scales), scaler_of(8.0), scaler_of(4.0)
    losses = [scaler.scale(leaf.loss()) for scaler in (first, second)]
    backward(losses[1], retain_graph=True)
    backward(losses[0])
    backward(losses[1])
    assert leaf.seen == [4.0, 8.0, 4.0]


def test_a_factor_that_grows(scales: LossScales) -> None:
    leaf, scaler = Leaf(scales), scaler_of(8.0)
    backward(scaler.scale(leaf.loss()))
    scaler.update(32.0)
    backward(scaler.scale(leaf.loss()))
    assert leaf.seen == [8.0, 32.0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_runs_a_part_of_the_backward(scales: LossScales, reentrant: bool) -> None:
    """With ``use_reentrant=True`` that part is a backward of its own."""
    leaf, start = Leaf(scales), torch.ones(3, requires_grad=True)
    backward(scaler_of(8.0).scale(checkpoint(lambda x: (x * leaf.parameter).sum(), start, use_reentrant=reentrant)))
    backward(checkpoint(lambda x: (x * leaf.parameter).sum(), start, use_reentrant=reentrant))
    assert leaf.seen == [8.0, 1.0]


def test_a_backward_that_fails_leaves_nothing(scales: LossScales) -> None:
    leaf = Leaf(scales)
    failing = leaf.loss()
    handle = leaf.parameter.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backward(scaler_of(8.0).scale(failing))
    handle.remove()
    backward(leaf.loss())
    assert leaf.seen == [8.0, 1.0]


def test_a_callback_after_all_gradients_knows_it(scales: LossScales) -> None:
    """HSDP may average in one."""
    leaf, seen = Leaf(scales), []

    def at_gradient(_: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append(scales.present()))

    leaf.parameter.register_hook(at_gradient)
    backward(scaler_of(8.0).scale(leaf.loss()))
    assert seen == [8.0]


def test_threads_have_backwards_of_their_own(scales: LossScales) -> None:
    leaves, scalers = [Leaf(scales) for _ in range(4)], [scaler_of(2.0**index) for index in range(4)]

    def train(leaf: Leaf, scaler: GradScaler) -> None:
        for _ in range(50):
            backward(scaler.scale(leaf.loss()))

    threads = [Thread(target=train, args=pair) for pair in zip(leaves, scalers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [leaf.seen for leaf in leaves] == [[2.0**index] * 50 for index in range(4)]


def test_without_gradients_a_loss_is_scaled_as_ever() -> None:
    assert scaler_of(8.0).scale(torch.ones(2)).tolist() == [8.0, 8.0]
    assert scaler_of(8.0).scale([torch.ones(())]) == [torch.tensor(8.0)]
