"""Graphs that can hold a site, and graphs that cannot: those are compiled exactly as by Inductor."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import dct_compile
from dct_compile.backend import dct
from dct_compile.passes.foresight import can_hold_sites
from tests.small_models import Averaged, all_reduce, exchange
from tests.tracing import fake_group

X = torch.randn(16, 64)


class Scaled(torch.autograd.Function):
    """Communicates nothing, forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * 2


def hooked(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(lambda gradient: gradient * 3)
    return y.sin()


def unknown(x: Tensor) -> Tensor:
    return torch.ops.dct.dequantize_rows(x.to(torch.uint8), [62], 8, torch.float32)  # type: ignore[no-any-return]


def foreseen(function: Callable[..., Any], *inputs: Any) -> list[bool]:
    found: list[bool] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        found.append(can_hold_sites(gm, examples))
        return gm.forward

    torch.compile(function, backend=backend)(*inputs)
    return found


WITHOUT: dict[str, Callable[..., Any]] = {
    "a layer": nn.Linear(64, 64),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "methods": lambda x: x.relu().view(-1)[3:].mean(),
    "autograd function": lambda x: Scaled.apply(x),
    "checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
    "branches": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
}
WITH: dict[str, Callable[..., Any]] = {
    "functional collective": all_reduce,
    "backward of an autograd function": lambda x: Averaged.apply(x),  # type: ignore[no-untyped-call]
    "inside of a checkpoint": lambda x: checkpoint(exchange, x, use_reentrant=False),
    "inside of a branch": lambda x: torch.cond(x.sum() > 0, all_reduce, torch.cos, (x,)),
    "operator of another library": unknown,
}


@pytest.mark.parametrize("name", WITHOUT)
def test_graphs_that_hold_no_site(name: str) -> None:
    with fake_group(4):
        assert foreseen(WITHOUT[name], X.clone().requires_grad_()) == [False]


@pytest.mark.parametrize("name", WITH)
def test_graphs_that_can_hold_a_site(name: str) -> None:
    with fake_group(4):
        assert foreseen(WITH[name], X.clone().requires_grad_()) == [True]


def test_a_tensor_subclass_can_bring_a_collective() -> None:
    with fake_group(4):
        assert foreseen(torch.relu, TwoTensor(X, X)) == [True]


def test_a_hook_can_bring_a_collective() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_method("register_hook", (x, None))
    graph.output((x,))
    assert can_hold_sites(fx.GraphModule({}, graph), [X])


def test_a_graph_without_sites_uses_the_autograd_cache_like_inductor() -> None:
    counters.clear()
    with fake_group(4), torch._functorch.config.patch(enable_autograd_cache=True), fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(lambda x: x.sin() * 2.25, backend=dct)(X.clone().requires_grad_()).sum().backward()
    assert (counters["aot_autograd"]["autograd_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"]) == (1, 1)
    dct_compile.reset_report()
