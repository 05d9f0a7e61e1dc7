"""The compiled CPU versions of the row ops. Same signatures as the references; where there is no compiler they are the references."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import DOUBLE, DTYPE_CODES, INT, POINTER, cpu_function
from dct_compile.triton_kernels.layout import quantized_row_bytes, row_bytes
from dct_compile.triton_kernels.quantize import (
    check_quantize_arguments,
    check_quantized,
    dequantize_rows_reference,
    quantize_rows_reference,
)
from dct_compile.triton_kernels.row_codec import check_row_payload, check_row_values, check_rows
from dct_compile.triton_kernels.rows_pack import METHODS, check_pack_arguments, laplace_factor, pack_rows_reference
from dct_compile.triton_kernels.rows_unpack import gather_rows_reference, scatter_rows_reference, unpack_rows_reference

_PACK = (POINTER, INT, INT, INT, INT, INT, DOUBLE, INT, POINTER, INT)
_UNPACK = (POINTER, INT, INT, INT, INT, INT, INT, POINTER, INT)
_GATHER = (POINTER, INT, INT, POINTER, INT, INT, INT, INT, INT, POINTER, INT)
_SCATTER = (POINTER, INT, POINTER, INT, INT, INT, INT, INT, INT, POINTER, INT)
_QUANTIZE = (POINTER, INT, INT, INT, POINTER, INT, POINTER, INT)
_DEQUANTIZE = (POINTER, INT, INT, INT, INT, POINTER, INT)


def pack_rows_cpu(x: Tensor, slots: int, method: str, density: float, fixed: float, value_dtype: torch.dtype) -> Tensor:
    """`pack_rows_reference`, compiled: one pass over the memory, the selection of a row in the first-level cache."""
    function = cpu_function("dct_pack_rows", _PACK)
    if function is None:
        return pack_rows_reference(x, slots, method, density, fixed, value_dtype)
    check_pack_arguments(x, slots, method, density, fixed, value_dtype)
    width, inner = x.shape[-1], math.prod(x.shape[1:-1])
    x = x.contiguous()
    payload = torch.empty(x.shape[0], inner * row_bytes(width, slots, value_dtype), dtype=torch.uint8)
    function(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape[0] * inner,
        width,
        slots,
        METHODS.index(method),
        laplace_factor(density) if method == "laplace" else fixed,
        DTYPE_CODES[value_dtype],
        payload.data_ptr(),
        torch.get_num_threads(),
    )
    return payload


def unpack_rows_cpu(
    payload: Tensor, row_shape: Sequence[int], slots: int, addends: int, value_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """`unpack_rows_reference`, compiled."""
    function = cpu_function("dct_unpack_rows", _UNPACK)
    if function is None:
        return unpack_rows_reference(payload, row_shape, slots, addends, value_dtype, dtype)
    check_row_payload(payload, row_shape, slots, addends, value_dtype, dtype)
    payload = payload.contiguous()
    out = torch.empty(payload.shape[0] // addends, *row_shape, dtype=dtype)
    function(
        payload.data_ptr(),
        DTYPE_CODES[value_dtype],
        out.shape[0] * math.prod(row_shape[:-1]),
        row_shape[-1],
        slots,
        addends,
        DTYPE_CODES[dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def gather_rows_cpu(grad: Tensor, payload: Tensor, slots: int, payload_dtype: torch.dtype, value_dtype: torch.dtype) -> Tensor:
    """`gather_rows_reference`, compiled."""
    function = cpu_function("dct_gather_rows", _GATHER)
    if function is None:
        return gather_rows_reference(grad, payload, slots, payload_dtype, value_dtype)
    check_rows(grad)
    check_row_payload(payload, grad.shape[1:], slots, grad.shape[0], payload_dtype, value_dtype)
    inner = math.prod(grad.shape[1:-1])
    grad, payload = grad.contiguous(), payload.contiguous()
    out = torch.empty(payload.shape[0], inner * slots, dtype=value_dtype)
    function(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        grad.shape[0] * inner,
        payload.data_ptr(),
        DTYPE_CODES[payload_dtype],
        payload.shape[0] * inner,
        grad.shape[-1],
        slots,
        DTYPE_CODES[value_dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def scatter_rows_cpu(
    values: Tensor, payload: Tensor, row_shape: Sequence[int], slots: int, addends: int, payload_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """`scatter_rows_reference`, compiled."""
    function = cpu_function("dct_scatter_rows", _SCATTER)
    if function is None:
        return scatter_rows_reference(values, payload, row_shape, slots, addends, payload_dtype, dtype)
    check_row_payload(payload, row_shape, slots, 1, payload_dtype, dtype)
    check_row_values(values, payload, row_shape, slots, addends)
    values, payload = values.contiguous(), payload.contiguous()
    out = torch.empty(payload.shape[0], *row_shape, dtype=dtype)
    function(
        values.data_ptr(),
        DTYPE_CODES[values.dtype],
        payload.data_ptr(),
        DTYPE_CODES[payload_dtype],
        payload.shape[0] * math.prod(row_shape[:-1]),
        row_shape[-1],
        slots,
        addends,
        DTYPE_CODES[dtype],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def quantize_rows_cpu(x: Tensor, seed: Tensor, bits: int) -> Tensor:
    """`quantize_rows_reference`, compiled: one pass over the memory."""
    function = cpu_function("dct_quantize_rows", _QUANTIZE)
    if function is None:
        return quantize_rows_reference(x, seed, bits)
    check_quantize_arguments(x, seed, bits)
    width, inner = x.shape[-1], math.prod(x.shape[1:-1])
    x = x.contiguous()
    payload = torch.empty(x.shape[0], inner * quantized_row_bytes(width, bits), dtype=torch.uint8)
    function(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape[0] * inner,
        width,
        seed.data_ptr(),
        bits,
        payload.data_ptr(),
        torch.get_num_threads(),
    )
    return payload


def dequantize_rows_cpu(payload: Tensor, row_shape: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """`dequantize_rows_reference`, compiled: one pass over the memory."""
    function = cpu_function("dct_dequantize_rows", _DEQUANTIZE)
    if function is None:
        return dequantize_rows_reference(payload, row_shape, bits, dtype)
    check_quantized(payload, row_shape, bits, dtype)
    payload = payload.contiguous()
    out = torch.empty(payload.shape[0], *row_shape, dtype=dtype)
    rows = payload.shape[0] * math.prod(row_shape[:-1])
    function(payload.data_ptr(), rows, row_shape[-1], bits, DTYPE_CODES[dtype], out.data_ptr(), torch.get_num_threads())
    return out
