"""Checks of the row operators' arguments, one for each operator and with its parameters: see `define_op`.

Kernels go through raw pointers, so nothing of another shape, dtype or device may reach them. A number of rows that is still symbolic while
a graph is traced is not looked at; the same check sees the number when the graph runs.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import RowLayout, quantized_row_bytes
from dct_compile.triton_kernels.layout_checks import MAX_FLOAT, ROW_DTYPES, check_density, check_integer, check_one_of, check_row_shape
from dct_compile.triton_kernels.quantize import largest_code
from dct_compile.triton_kernels.rows_pack import METHODS


def check_pack_rows(x: Tensor, layout: RowLayout, method: str, density: float, fixed: float) -> None:
    """Raises ValueError for arguments that `pack_rows` does not take."""
    _check_dense(x, layout)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    check_density(density)
    if not 0 <= fixed <= MAX_FLOAT:
        raise ValueError(f"fixed threshold {fixed} is negative, NaN, or above {MAX_FLOAT}")


def check_unpack_rows(payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> None:
    """Raises ValueError for arguments that `unpack_rows` does not take."""
    check_integer("addends", addends, 1)
    _check_dtype("dtype of the rows", dtype)
    _check_payload(payload, layout.inner * layout.row_bytes)
    _check_multiple(payload.shape[0], addends)


def check_gather_rows(grad: Tensor, payload: Tensor, layout: RowLayout, value_dtype: torch.dtype) -> None:
    """Raises ValueError for arguments that `gather_rows` does not take."""
    _check_dense(grad, layout)
    _check_dtype("value dtype", value_dtype)
    _check_payload(payload, layout.inner * layout.row_bytes)
    _check_multiple(payload.shape[0], grad.shape[0])
    _check_device("payload", payload, grad)


def check_scatter_rows(values: Tensor, payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> None:
    """Raises ValueError for arguments that `scatter_rows` does not take."""
    check_integer("addends", addends, 1)
    _check_dtype("dtype of the rows", dtype)
    _check_payload(payload, layout.inner * layout.row_bytes)
    _check_dtype("value dtype", values.dtype)
    columns = layout.inner * layout.capacity
    rows = payload.shape[0] * addends
    if values.dim() != 2 or values.shape[1] != columns or (_is_known(values.shape[0], rows) and values.shape[0] != rows):
        raise ValueError(f"values are {tuple(values.shape)}, expected {(rows, columns)}")
    _check_device("payload", payload, values)


def check_quantize_rows(x: Tensor, seed: Tensor, bits: int) -> None:
    """Raises ValueError for arguments that `quantize_rows` does not take."""
    largest_code(bits)
    _check_rows(x)
    if x.shape[-1] == 0:
        raise ValueError(f"rows are {tuple(x.shape)}, expected one element or more in each")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed is {seed.dtype} {tuple(seed.shape)}, expected int64 [1]")
    _check_device("seed", seed, x)


def check_dequantize_rows(payload: Tensor, row_shape: Sequence[int], bits: int, dtype: torch.dtype) -> None:
    """Raises ValueError for arguments that `dequantize_rows` does not take."""
    largest_code(bits)
    _check_dtype("dtype of the rows", dtype)
    check_row_shape(row_shape)
    _check_payload(payload, math.prod(row_shape[:-1]) * quantized_row_bytes(row_shape[-1], bits))


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    check_one_of(name, dtype, ROW_DTYPES)


def _check_rows(x: Tensor) -> None:
    _check_dtype("dtype of the rows", x.dtype)
    if x.dim() < 2:
        raise ValueError(f"rows are {tuple(x.shape)}, expected [R, *row_shape]")


def _check_dense(x: Tensor, layout: RowLayout) -> None:
    _check_rows(x)
    if x.shape[1:] != layout.row_shape:
        raise ValueError(f"rows are {list(x.shape)}, expected R by {list(layout.row_shape)}")


def _check_payload(payload: Tensor, columns: int) -> None:
    if payload.dtype != torch.uint8 or payload.dim() != 2 or payload.shape[1] != columns:
        raise ValueError(f"payload is {payload.dtype} {tuple(payload.shape)}, expected uint8 [rows, {columns}]")


def _check_multiple(rows: int, blocks_of: int) -> None:
    if _is_known(rows, blocks_of) and rows != 0 and (blocks_of == 0 or rows % blocks_of != 0):
        raise ValueError(f"payload has {rows} rows, expected a multiple of {blocks_of}")


def _check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {other.device}")


def _is_known(*sizes: int) -> bool:
    return all(isinstance(size, int) for size in sizes)
