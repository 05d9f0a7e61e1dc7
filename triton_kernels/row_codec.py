"""How the kept entries of a row become bytes and come back: shared by the PyTorch references of the row ops.

One row of a payload (``row_bytes`` of layout.py)::

    values  [slots]   value dtype      kept entries, by ascending place in the row
    indices [slots]   uint8 / uint16   place of each entry, little-endian; uint8 up to a width of 256

Free slots stand at the end and are all zero bytes. Because places ascend, only slot 0 can hold place 0 with a meaning; therefore a slot is
*valid* iff its index is not 0 or, for slot 0, iff its value is not zero. No count travels, and both ends of a link find the same slots.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import row_bytes

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


def check_row_format(width: int, slots: int, value_dtype: torch.dtype) -> None:
    """Raises ValueError for a row that the payload cannot express."""
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"row width {width} is outside 1..{MAX_WIDTH}")
    if not 1 <= slots <= width:
        raise ValueError(f"slots {slots} is outside 1..{width}, the width of the row")
    check_dtype(value_dtype, "value dtype")


def check_row_payload(
    payload: Tensor, row_shape: Sequence[int], slots: int, blocks_of: int, value_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Raises ValueError if ``payload`` is not uint8 [a multiple of ``blocks_of``, inner * row_bytes], or for a dtype that is not known."""
    width = row_shape[-1]
    check_dtype(dtype, "dtype of the rows")
    check_row_format(width, slots, value_dtype)
    columns = math.prod(row_shape[:-1]) * row_bytes(width, slots, value_dtype)
    if payload.dtype != torch.uint8 or payload.dim() != 2 or payload.shape[1] != columns:
        raise ValueError(f"payload is {payload.dtype} {tuple(payload.shape)}, expected uint8 [rows, {columns}]")
    if payload.shape[0] != 0 and (blocks_of == 0 or payload.shape[0] % blocks_of != 0):
        raise ValueError(f"payload has {payload.shape[0]} rows, expected a multiple of {blocks_of}")


def check_row_values(values: Tensor, payload: Tensor, row_shape: Sequence[int], slots: int, addends: int) -> None:
    """Raises ValueError if ``values`` is not a value dtype [addends * the payload's rows, inner * slots]."""
    expected = (addends * payload.shape[0], math.prod(row_shape[:-1]) * slots)
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


def encode_rows(values: Tensor, indices: Tensor, width: int) -> Tensor:
    """Bytes of rows: ``values`` [N, slots] in the value dtype and ``indices`` int64 [N, slots] -> uint8 [N, row_bytes]."""
    rows, slots = values.shape
    value_bytes = values.contiguous().view(torch.uint8).reshape(rows, slots * values.element_size())
    parts = [indices] if width <= 256 else [indices & 255, indices >> 8]
    index_bytes = torch.stack(parts, dim=-1).to(torch.uint8).reshape(rows, slots * len(parts))
    return torch.cat([value_bytes, index_bytes], dim=1)


def decode_rows(payload: Tensor, width: int, slots: int, value_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Reads rows: ``payload`` uint8 [R, inner * row_bytes] -> (values [R * inner, slots], indices int64, valid bool, same shape).

    An index that is not less than ``width`` (a damaged payload) is not valid, so that nothing is read or written outside a row.
    """
    rows = payload.reshape(-1, row_bytes(width, slots, value_dtype))
    split = slots * value_dtype.itemsize
    values = rows[:, :split].clone(memory_format=torch.contiguous_format).view(value_dtype)
    index_bytes = rows[:, split:].reshape(rows.shape[0], slots, 1 if width <= 256 else 2).long()
    indices = index_bytes[:, :, 0] if width <= 256 else index_bytes[:, :, 0] | index_bytes[:, :, 1] << 8
    valid = indices != 0
    valid[:, 0] = values[:, 0] != 0
    return values, indices, valid & (indices < width)
