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
