"""The reference of what model parallelism sends: a mask of each row, in eager mode."""

from math import ceil
from typing import Any

import torch
from torch import Tensor


class RowMask(torch.autograd.Function):
    """The largest ``density * width`` entries of each row, exact zeros never; the gradient behind the same mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, density: float, value_dtype: torch.dtype) -> Tensor:
        order = x.abs().sort(dim=-1, descending=True, stable=True).indices
        kept = order[..., : ceil(density * x.shape[-1])]
        ctx.mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, kept, True) & (x != 0)
        ctx.value_dtype = value_dtype
        return (x * ctx.mask).to(value_dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.mask).to(ctx.value_dtype).to(grad.dtype), None, None


def masked(h: Tensor, density: float, value_dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns ``h`` [rows, width] with the entries that are not sent set to zero and the others rounded to ``value_dtype``."""
    return RowMask.apply(h, density, value_dtype)
