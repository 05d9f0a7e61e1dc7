"""How the kept entries of a row become bytes and come back: shared by the PyTorch references of the row ops.

One row of a payload (``RowLayout.row_bytes``)::

    values  [capacity]   value dtype      kept entries, by ascending index
    indices [capacity]   uint8 / uint16   index of each entry in the row, little-endian; uint8 up to a width of 256

Free entries stand at the end and are all zero bytes. Because indices ascend, only the first entry can mean index 0; therefore an entry is
*valid* iff its index is not 0 or, for the first one, iff its value is not zero. No count travels, and both ends of a link find the same
entries.
"""

import math

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import RowLayout

MAX_WIDTH = 65536
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """Raises ValueError for a dtype that the row ops do not take."""
    if dtype not in VALUE_DTYPES:
        raise ValueError(f"{what} is {dtype}, expected one of {VALUE_DTYPES}")


def check_rows(x: Tensor) -> None:
    """Raises ValueError if ``x`` is not [R, *row_shape] of a dtype that the row ops take."""
    check_dtype(x.dtype, "dtype of the rows")
    if x.dim() < 2:
        raise ValueError(f"rows are {tuple(x.shape)}, expected [R, *row_shape]")


def check_row_layout(layout: RowLayout) -> None:
    """Raises ValueError for a row that the payload cannot express."""
    if not layout.row_shape:
        raise ValueError("row_shape is empty, expected at least the width of the rows")
    if not 1 <= layout.width <= MAX_WIDTH:
        raise ValueError(f"row width {layout.width} is outside 1..{MAX_WIDTH}")
    if not 1 <= layout.capacity <= layout.width:
        raise ValueError(f"capacity {layout.capacity} is outside 1..{layout.width}, the width of the row")
    check_dtype(layout.value_dtype, "value dtype")


def check_dense_rows(x: Tensor, layout: RowLayout) -> None:
    """Raises ValueError if ``x`` is not [R, *layout.row_shape] of a dtype that the row ops take, or for a layout that means nothing."""
    check_rows(x)
    check_row_layout(layout)
    if tuple(x.shape[1:]) != tuple(layout.row_shape):
        raise ValueError(f"rows are {list(x.shape)}, expected R by {list(layout.row_shape)}")


def check_row_payload(payload: Tensor, layout: RowLayout, blocks_of: int, dtype: torch.dtype) -> None:
    """Raises ValueError if ``payload`` is not uint8 [a multiple of ``blocks_of``, inner * row_bytes], or for a dtype that is not known."""
    check_dtype(dtype, "dtype of the rows")
    check_row_layout(layout)
    columns = layout.inner * layout.row_bytes
    if payload.dtype != torch.uint8 or payload.dim() != 2 or payload.shape[1] != columns:
        raise ValueError(f"payload is {payload.dtype} {tuple(payload.shape)}, expected uint8 [rows, {columns}]")
    if payload.shape[0] != 0 and (blocks_of == 0 or payload.shape[0] % blocks_of != 0):
        raise ValueError(f"payload has {payload.shape[0]} rows, expected a multiple of {blocks_of}")


def check_row_values(values: Tensor, payload: Tensor, layout: RowLayout, addends: int) -> None:
    """Raises ValueError if ``values`` is not a value dtype [addends * the payload's rows, inner * capacity]."""
    expected = (addends * payload.shape[0], layout.inner * layout.capacity)
    check_dtype(values.dtype, "value dtype")
    if tuple(values.shape) != expected:
        raise ValueError(f"values are {tuple(values.shape)}, expected {expected}")


def round_to_value(values: Tensor, value_dtype: torch.dtype) -> Tensor:
    """``values`` (float32) to nearest even in ``value_dtype``; a finite value stays finite; every NaN becomes the one quiet NaN.

    One NaN only, because libraries differ in the NaN bits that a conversion leaves, and payloads are compared by their bytes.
    """
    largest = torch.finfo(value_dtype).max
    rounded = torch.where(values.isfinite(), values.clamp(-largest, largest), values).to(value_dtype)
    return rounded.masked_fill(values.isnan(), math.nan)


def encode_rows(values: Tensor, indices: Tensor, layout: RowLayout) -> Tensor:
    """Returns bytes of rows: ``values`` [N, capacity] in the value dtype and ``indices`` int64 [N, capacity] -> uint8 [N, row_bytes]."""
    rows, capacity = values.shape
    value_bytes = values.contiguous().view(torch.uint8).reshape(rows, capacity * values.element_size())
    parts = [indices] if layout.index_bytes == 1 else [indices & 255, indices >> 8]
    index_bytes = torch.stack(parts, dim=-1).to(torch.uint8).reshape(rows, capacity * len(parts))
    return torch.cat([value_bytes, index_bytes], dim=1)


def decode_rows(payload: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Reads rows: ``payload`` uint8 [R, inner * row_bytes] -> (values [R * inner, capacity], indices int64, valid bool, same shape).

    An index that is not less than the width (a damaged payload) is not valid, so that nothing is read or written outside a row.
    """
    rows = payload.reshape(-1, layout.row_bytes)
    split = layout.capacity * layout.value_dtype.itemsize
    values = rows[:, :split].clone(memory_format=torch.contiguous_format).view(layout.value_dtype)
    index_bytes = rows[:, split:].reshape(rows.shape[0], layout.capacity, layout.index_bytes).long()
    indices = index_bytes[:, :, 0] if layout.index_bytes == 1 else index_bytes[:, :, 0] | index_bytes[:, :, 1] << 8
    valid = indices != 0
    valid[:, 0] = values[:, 0] != 0
    return values, indices, valid & (indices < layout.width)
