"""Checks of the gradient ops' tensors, which every implementation makes before it goes through raw pointers."""

from functools import lru_cache

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import COUNTERS, GradientLayout

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@lru_cache(maxsize=4096)
def grad_extent(layout: GradientLayout) -> int:
    """Returns the least number of elements of a gradient buffer that holds all pieces."""
    return max((piece.grad_offset + piece.numel for piece in layout.pieces), default=0)


def check_state(grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool) -> None:
    """Raises ValueError, naming the tensor, where a shape, dtype, device or stride is not the one that the layout asks for.

    Without error feedback the residual is not looked at and may be empty.
    """
    parameters = len(layout.segments)
    if grad.dtype not in FLOAT_DTYPES or grad.numel() < grad_extent(layout):
        raise ValueError(f"grad is {grad.dtype} [{grad.numel()}]: expected float32, bfloat16 or float16 of at least {grad_extent(layout)}")
    if error_feedback:
        _check("residual", residual, torch.float32, layout.state_numel, grad.device)
    _check("threshold", threshold, torch.float32, parameters, grad.device)
    _check("counters", counters, torch.int64, parameters * COUNTERS, grad.device)


def check_gathered(gathered: Tensor, layout: GradientLayout, dense: Tensor | None, numel: int) -> int:
    """Returns the number of chunk payloads in ``gathered``; raises ValueError where sizes do not go together."""
    chunk_bytes = max(layout.chunk_bytes, 1)
    payloads, rest = divmod(gathered.numel(), chunk_bytes)
    if gathered.dtype != torch.uint8 or rest or payloads % layout.payload_chunks:
        whole = f"{layout.payload_chunks} times n times {chunk_bytes}"
        raise ValueError(f"gathered is {gathered.dtype} [{gathered.numel()}]: expected uint8, {whole}")
    if numel < grad_extent(layout):
        raise ValueError(f"a bucket of {numel} elements cannot hold its segments, which reach to {grad_extent(layout)}")
    if dense is not None and dense.numel() != numel - layout.state_numel:
        raise ValueError(f"dense has {dense.numel()} elements: {numel - layout.state_numel} are not covered by segments")
    return payloads


def _check(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.numel() != numel or tensor.device != device or not tensor.is_contiguous():
        found = f"{tensor.dtype} [{tensor.numel()}] on {tensor.device}, strides {tensor.stride()}"
        raise ValueError(f"{name} is {found}: expected contiguous {dtype} [{numel}] on {device}")
