"""Functions and modules of a few operators, for tracing."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

c10d = torch.ops._c10d_functional


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random input that wants a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def ids(*shape: int) -> Tensor:
    """Rows of an embedding table of at least 8 rows."""
    return torch.randint(0, 8, shape)


def exchange(x: Tensor) -> Tensor:
    exchanged: Tensor = funcol.all_to_all_single_autograd(x, None, None, world())
    return exchanged


def gather(x: Tensor, dim: int = 0) -> Tensor:
    gathered: Tensor = funcol.all_gather_tensor_autograd(x, dim, world())
    return gathered


def reduce_scatter(x: Tensor, op: str = "sum") -> Tensor:
    scattered: Tensor = funcol.reduce_scatter_tensor_autograd(x, op, 0, world())
    return scattered


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    reduced: Tensor = funcol.all_reduce(x, op, world())
    return reduced


class SumOfParts(torch.autograd.Function):
    """The exit of a row-parallel layer: an all_reduce whose backward sends nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class ColumnParallel(torch.autograd.Function):
    """The identity; its backward adds up the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient)


class Averaged(ColumnParallel):
    """The identity; its backward averages the gradient over all ranks."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient, "avg")


class SummedAndDivided(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient) / world().size()


class AveragedFlat(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient.reshape(-1), "avg").view(gradient.shape)


class Weighted(nn.Module):
    """``x @ synchronise(weight)``, weight [width, width]."""

    def __init__(self, synchronise: type[torch.autograd.Function] = Averaged, width: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.synchronise = synchronise

    def forward(self, x: Tensor) -> Any:
        return x @ self.synchronise.apply(self.weight)


class Layers(nn.Module):
    """Two linear layers; what lies between them is exchanged if ``exchanged``."""

    def __init__(self, exchanged: bool = False) -> None:
        super().__init__()
        self.bottom = nn.Linear(64, 64)
        self.top = nn.Linear(64, 32)
        self.exchanged = exchanged

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.bottom(x))
        return self.top(exchange(hidden) if self.exchanged else hidden)
