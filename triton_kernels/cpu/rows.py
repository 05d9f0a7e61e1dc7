"""The compiled CPU versions of the row ops, with the signatures of the references."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import DOUBLE, INT, POINTER, cpu_function
from dct_compile.triton_kernels.cpu.structs import ROW_FORMAT, ROWS, RowFormat, Rows
from dct_compile.triton_kernels.layout import RowLayout, quantized_row_bytes
from dct_compile.triton_kernels.rows_pack import METHODS, laplace_factor

_PACK = (ROWS, ROW_FORMAT, INT, DOUBLE, POINTER, INT)
_UNPACK = (POINTER, ROW_FORMAT, INT, ROWS, INT)
_GATHER = (ROWS, POINTER, ROW_FORMAT, ROWS, INT)
_SCATTER = (ROWS, POINTER, ROW_FORMAT, INT, ROWS, INT)
_QUANTIZE = (ROWS, INT, POINTER, INT, POINTER, INT)
_DEQUANTIZE = (POINTER, INT, INT, ROWS, INT)


def pack_rows_cpu(x: Tensor, layout: RowLayout, method: str, density: float, fixed: float) -> Tensor:
    """Computes `pack_rows_reference`, compiled: one pass over the memory, the selection of a row in the first-level cache."""
    x = x.contiguous()
    payload = torch.empty(x.shape[0], layout.inner * layout.row_bytes, dtype=torch.uint8)
    parameter = laplace_factor(density) if method == "laplace" else fixed
    threads = torch.get_num_threads()
    arguments = (Rows.of(x, layout.inner), RowFormat.of(layout), METHODS.index(method), parameter, payload.data_ptr(), threads)
    cpu_function("dct_pack_rows", _PACK)(*arguments)
    return payload


def unpack_rows_cpu(payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    """Computes `unpack_rows_reference`, compiled."""
    payload = payload.contiguous()
    out = torch.empty(payload.shape[0] // addends, *layout.row_shape, dtype=dtype)
    arguments = (payload.data_ptr(), RowFormat.of(layout), addends, Rows.of(out, layout.inner), torch.get_num_threads())
    cpu_function("dct_unpack_rows", _UNPACK)(*arguments)
    return out


def gather_rows_cpu(grad: Tensor, payload: Tensor, layout: RowLayout, value_dtype: torch.dtype) -> Tensor:
    """Computes `gather_rows_reference`, compiled."""
    grad, payload = grad.contiguous(), payload.contiguous()
    out = torch.empty(payload.shape[0], layout.inner * layout.capacity, dtype=value_dtype)
    source, values = Rows.of(grad, layout.inner), Rows.of(out, layout.inner)
    cpu_function("dct_gather_rows", _GATHER)(source, payload.data_ptr(), RowFormat.of(layout), values, torch.get_num_threads())
    return out


def scatter_rows_cpu(values: Tensor, payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    """Computes `scatter_rows_reference`, compiled."""
    values, payload = values.contiguous(), payload.contiguous()
    out = torch.empty(payload.shape[0], *layout.row_shape, dtype=dtype)
    source, rows = Rows.of(values, layout.inner), Rows.of(out, layout.inner)
    cpu_function("dct_scatter_rows", _SCATTER)(source, payload.data_ptr(), RowFormat.of(layout), addends, rows, torch.get_num_threads())
    return out


def quantize_rows_cpu(x: Tensor, seed: Tensor, bits: int) -> Tensor:
    """Computes `quantize_rows_reference`, compiled: one pass over the memory."""
    width, inner = x.shape[-1], math.prod(x.shape[1:-1])
    x = x.contiguous()
    payload = torch.empty(x.shape[0], inner * quantized_row_bytes(width, bits), dtype=torch.uint8)
    arguments = (Rows.of(x, inner), width, seed.data_ptr(), bits, payload.data_ptr(), torch.get_num_threads())
    cpu_function("dct_quantize_rows", _QUANTIZE)(*arguments)
    return payload


def dequantize_rows_cpu(payload: Tensor, row_shape: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """Computes `dequantize_rows_reference`, compiled: one pass over the memory."""
    payload = payload.contiguous()
    out = torch.empty(payload.shape[0], *row_shape, dtype=dtype)
    rows = Rows.of(out, math.prod(row_shape[:-1]))
    cpu_function("dct_dequantize_rows", _DEQUANTIZE)(payload.data_ptr(), row_shape[-1], bits, rows, torch.get_num_threads())
    return out
