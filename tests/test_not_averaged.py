"""Gradients that ``data_parallel`` does not average: the report says which, and is silent about all others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.utils.checkpoint import checkpoint

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Note

pytestmark = pytest.mark.usefixtures("fake_group_of_two")
MODEL = nn.Linear(8, 8)
PARAMETERS = dict(MODEL.named_parameters())
DETACHED = {name: parameter.detach() for name, parameter in PARAMETERS.items()}


class Scaled(nn.Module):
    """A layer, and a leaf beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), torch.ones(8, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


class Potential(nn.Module):
    """Its forces are the gradient of an energy by the positions: a part of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, positions: Tensor) -> Tensor:
        return torch.func.grad(lambda x: self.layer(x).tanh().sum())(positions)


class Penalised(Potential):
    """The size of the gradient by a cast of the example."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.clone())
        (slope,) = torch.autograd.grad(out.tanh().sum(), [x], create_graph=True)
        return out + slope.square().sum()


class Repeated(Potential):
    """A part of it is computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=False)


def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.func.functional_call(MODEL, parameters, (x,)).tanh().sum()


def by_autograd(parameters: dict[str, Tensor], x: Tensor) -> Any:
    return torch.autograd.grad(loss(parameters, x), list(parameters.values()))


def by_backward(parameters: dict[str, Tensor], x: Tensor) -> None:
    loss(parameters, x).backward()


def in_short(parameters: dict[str, Tensor], x: Tensor) -> Any:
    return torch.func.grad(lambda short: loss(short, x.bfloat16()))({name: value.bfloat16() for name, value in parameters.items()})


def notes(function: Callable[..., Any], *inputs: Any, **options: Any) -> list[str]:
    """The notes on one call."""
    with dynamo_config.patch(trace_autograd_ops=True):
        torch.compile(function, backend=dct, options={"data_parallel": True, **options})(*inputs)
    return list(dct_compile.report().notes)


OWN: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "func.grad": (torch.func.grad(loss), PARAMETERS),
    "func.grad_and_value": (torch.func.grad_and_value(loss), PARAMETERS),
    "func.vjp": (lambda parameters, x: torch.func.vjp(loss, parameters, x)[1](torch.ones(())), PARAMETERS),
    "func.grad in bfloat16": (in_short, PARAMETERS),
    "func.grad of detached parameters": (torch.func.grad(loss), DETACHED),
    "autograd.grad": (by_autograd, PARAMETERS),
    "backward": (by_backward, PARAMETERS),
}


@pytest.mark.parametrize("case", OWN)
def test_gradients_that_a_graph_computes_are_named(case: str) -> None:
    function, parameters = OWN[case]
    (note,) = (note for note in notes(function, parameters, torch.randn(4, 8)) if "that a graph computes itself" in note)
    assert note.startswith(Note.IN_THE_GRAPH.partition("{")[0])
    assert all(name in note for name in parameters)


@pytest.mark.parametrize("model", [Potential, Penalised, Repeated])
def test_a_gradient_by_an_input_is_a_part_of_the_forward(model: type[nn.Module]) -> None:
    assert notes(model(), torch.randn(4, 8, requires_grad=True)) == []


def test_leaves_that_are_no_parameters_are_named() -> None:
    assert notes(Scaled(), torch.randn(4, 8)) == [Note.NO_PARAMETERS.format(parameters="scale")]


def test_arguments_are_leaves_where_nothing_else_is_trained() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    assert notes(lambda w, x: torch.tanh(x @ w), weight, torch.randn(4, 8)) == [Note.NO_PARAMETERS.format(parameters="L['w']")]


def test_an_input_that_wants_a_gradient_is_no_such_leaf() -> None:
    assert notes(MODEL, torch.randn(4, 8, requires_grad=True)) == []


@pytest.mark.parametrize("function", [torch.func.grad(loss), Scaled()], ids=["own", "leaf"])
def test_without_data_parallel_nothing_is_said(function: Any) -> None:
    inputs = (torch.randn(4, 8),) if isinstance(function, Scaled) else (PARAMETERS, torch.randn(4, 8))
    assert not any("data_parallel does not average" in note for note in notes(function, *inputs, data_parallel=False))


def test_an_evaluation_trains_no_leaf() -> None:
    with torch.no_grad():
        assert notes(Scaled(), torch.randn(4, 8)) == []
