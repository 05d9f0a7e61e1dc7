"""Checks of the gradient operators' arguments, one for each operator and with its parameters: see `define_op`.

Kernels go through raw pointers, so nothing of another shape, dtype or device may reach them. Sizes that are still symbolic while a graph
is traced are not looked at; the same check sees the numbers when the graph runs.
"""

from functools import lru_cache

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import COUNTERS, GradientLayout, Selection
from dct_compile.triton_kernels.layout_checks import ROW_DTYPES, check_integer, check_one_for_each, check_one_of


@lru_cache(maxsize=4096)
def grad_extent(layout: GradientLayout) -> int:
    """Returns the least number of elements of a gradient buffer that holds all pieces."""
    if layout.chunk >= 0:
        return layout.state_numel
    return max((offset + numel for offset, numel in layout.segments), default=0)


def check_select_threshold(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    """Raises ValueError, naming the tensor, for arguments that `select_threshold` does not take."""
    check_one_for_each("density", selection.density, layout)
    _check_grad(grad, layout)
    _check_state(grad.device, residual, threshold, counters, layout, error_feedback)


def check_threshold_pack(
    grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> None:
    """Raises ValueError, naming the tensor, for arguments that `threshold_pack` does not take."""
    _check_grad(grad, layout)
    _check_state(grad.device, residual, threshold, counters, layout, error_feedback)


def check_unpack_accumulate(
    gathered: Tensor, dense: Tensor | None, numel: int, dtype: torch.dtype, layout: GradientLayout, divisor: int
) -> None:
    """Raises ValueError, naming the argument, for arguments that `unpack_accumulate` does not take."""
    _check_gathered(gathered, layout)
    check_one_of("dtype", dtype, ROW_DTYPES)
    check_integer("divisor", divisor, 1)
    if not isinstance(numel, int):
        return
    _check_extent(numel, layout)
    if dense is not None:
        uncovered = numel - layout.state_numel
        if dense.dim() != 1 or (isinstance(dense.shape[0], int) and dense.shape[0] != uncovered):
            raise ValueError(f"dense has {dense.numel()} elements: {uncovered} are not covered by segments")
        if dense.dtype not in ROW_DTYPES or dense.device != gathered.device:
            raise ValueError(f"dense is {dense.dtype} on {dense.device}: expected float32, bfloat16 or float16 on {gathered.device}")


def check_unpack_into(out: Tensor, gathered: Tensor, dense: Tensor | None, layout: GradientLayout, divisor: int) -> None:
    """Raises ValueError, naming the argument, for arguments that `unpack_into` does not take."""
    if out.dim() != 1 or not out.is_contiguous() or out.device != gathered.device:
        found = f"{list(out.shape)}, {'' if out.is_contiguous() else 'not '}contiguous, on {out.device}"
        raise ValueError(f"out is {found}: expected one dimension, contiguous, on {gathered.device}")
    check_unpack_accumulate(gathered, dense, out.shape[0], out.dtype, layout, divisor)


def check_repack(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    """Raises ValueError, naming the tensor, for arguments that `repack` does not take."""
    check_one_for_each("density", selection.density, layout)
    _check_gathered(gathered, layout)
    _check_extent(layout.state_numel, layout)
    _check_state(gathered.device, residual, threshold, counters, layout, error_feedback)


def _check_grad(grad: Tensor, layout: GradientLayout) -> None:
    extent = grad_extent(layout)
    if grad.dtype not in ROW_DTYPES or grad.dim() != 1 or (isinstance(grad.shape[0], int) and grad.shape[0] < extent):
        raise ValueError(f"grad is {grad.dtype} {list(grad.shape)}: expected float32, bfloat16 or float16 of at least {extent}")


def _check_extent(numel: int, layout: GradientLayout) -> None:
    if numel < grad_extent(layout):
        raise ValueError(f"a bucket of {numel} elements cannot hold its segments, which reach to {grad_extent(layout)}")


def _check_state(
    device: torch.device, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> None:
    """Without error feedback the residual is not looked at and may be empty."""
    parameters = len(layout.segments)
    if error_feedback:
        _check("residual", residual, torch.float32, (layout.state_numel,), device)
    _check("threshold", threshold, torch.float32, (parameters,), device)
    _check("counters", counters, torch.int64, (parameters, COUNTERS), device)


def _check_gathered(gathered: Tensor, layout: GradientLayout) -> None:
    whole = max(layout.payload_bytes, 1)
    if gathered.dtype != torch.uint8 or gathered.dim() != 1 or (isinstance(gathered.shape[0], int) and gathered.shape[0] % whole):
        expected = f"{layout.payload_chunks} times n times {layout.chunk_bytes}"
        raise ValueError(f"gathered is {gathered.dtype} {list(gathered.shape)}: expected uint8, {expected}")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
        raise ValueError(f"{name} is {found}: expected contiguous {dtype} {list(shape)} on {device}")
