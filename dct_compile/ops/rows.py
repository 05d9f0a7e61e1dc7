"""The operators of model parallelism: rows packed by threshold (`[Gupta21]`'s DCT-MP) and the codec of embedding exchanges.

A row is the last dimension of a tensor [R, *row_shape]. R may be symbolic; ``row_shape`` is static. Results keep R (or a whole multiple of
it) as leading dimension, so that the splits of a collective keep their meaning. What each operator means is said by its PyTorch reference.
"""

import math

import torch
from torch import Tensor

from dct_compile.ops.library import define_op
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.rows import (
    dequantize_rows_cpu,
    gather_rows_cpu,
    pack_rows_cpu,
    quantize_rows_cpu,
    scatter_rows_cpu,
    unpack_rows_cpu,
)
from dct_compile.triton_kernels.layout import quantized_row_bytes, row_bytes
from dct_compile.triton_kernels.quantize import check_quantize_arguments, dequantize_rows_reference, quantize_rows_reference
from dct_compile.triton_kernels.quantize_triton import dequantize_rows_triton, quantize_rows_triton
from dct_compile.triton_kernels.rows_pack import check_pack_arguments, pack_rows_reference
from dct_compile.triton_kernels.rows_pack_triton import pack_rows_triton
from dct_compile.triton_kernels.rows_unpack import gather_rows_reference, scatter_rows_reference, unpack_rows_reference
from dct_compile.triton_kernels.rows_unpack_triton import gather_rows_triton, scatter_rows_triton, unpack_rows_triton


def _pack_rows_fake(x: Tensor, slots: int, method: str, density: float, fixed: float, value_dtype: torch.dtype) -> Tensor:
    check_pack_arguments(x, slots, method, density, fixed, value_dtype)
    return x.new_empty((x.shape[0], math.prod(x.shape[1:-1]) * row_bytes(x.shape[-1], slots, value_dtype)), dtype=torch.uint8)


def _unpack_rows_fake(
    payload: Tensor, row_shape: list[int], slots: int, addends: int, value_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    rows = payload.shape[0] if addends == 1 else payload.shape[0] // addends
    return payload.new_empty((rows, *row_shape), dtype=dtype)


def _gather_rows_fake(grad: Tensor, payload: Tensor, slots: int, payload_dtype: torch.dtype, value_dtype: torch.dtype) -> Tensor:
    return grad.new_empty((payload.shape[0], math.prod(grad.shape[1:-1]) * slots), dtype=value_dtype)


def _scatter_rows_fake(
    values: Tensor, payload: Tensor, row_shape: list[int], slots: int, addends: int, payload_dtype: torch.dtype, dtype: torch.dtype
) -> Tensor:
    return payload.new_empty((payload.shape[0], *row_shape), dtype=dtype)


def _quantize_rows_fake(x: Tensor, seed: Tensor, bits: int) -> Tensor:
    check_quantize_arguments(x, seed, bits)
    return x.new_empty((x.shape[0], math.prod(x.shape[1:-1]) * quantized_row_bytes(x.shape[-1], bits)), dtype=torch.uint8)


def _dequantize_rows_fake(payload: Tensor, row_shape: list[int], bits: int, dtype: torch.dtype) -> Tensor:
    return payload.new_empty((payload.shape[0], *row_shape), dtype=dtype)


pack_rows = define_op(
    "pack_rows(Tensor x, int slots, str method, float density, float fixed, ScalarType value_dtype) -> Tensor",
    fake=_pack_rows_fake,
    cpu=pack_rows_cpu,
    cuda=pack_rows_triton if HAS_TRITON else pack_rows_reference,
)
unpack_rows = define_op(
    "unpack_rows(Tensor payload, int[] row_shape, int slots, int addends, ScalarType value_dtype, ScalarType dtype) -> Tensor",
    fake=_unpack_rows_fake,
    cpu=unpack_rows_cpu,
    cuda=unpack_rows_triton if HAS_TRITON else unpack_rows_reference,
)
gather_rows = define_op(
    "gather_rows(Tensor grad, Tensor payload, int slots, ScalarType payload_dtype, ScalarType value_dtype) -> Tensor",
    fake=_gather_rows_fake,
    cpu=gather_rows_cpu,
    cuda=gather_rows_triton if HAS_TRITON else gather_rows_reference,
)
scatter_rows = define_op(
    "scatter_rows(Tensor values, Tensor payload, int[] row_shape, int slots, int addends, ScalarType payload_dtype, ScalarType dtype)"
    " -> Tensor",
    fake=_scatter_rows_fake,
    cpu=scatter_rows_cpu,
    cuda=scatter_rows_triton if HAS_TRITON else scatter_rows_reference,
)
quantize_rows = define_op(
    "quantize_rows(Tensor x, Tensor seed, int bits) -> Tensor",
    fake=_quantize_rows_fake,
    cpu=quantize_rows_cpu,
    cuda=quantize_rows_triton if HAS_TRITON else quantize_rows_reference,
)
dequantize_rows = define_op(
    "dequantize_rows(Tensor payload, int[] row_shape, int bits, ScalarType dtype) -> Tensor",
    fake=_dequantize_rows_fake,
    cpu=dequantize_rows_cpu,
    cuda=dequantize_rows_triton if HAS_TRITON else dequantize_rows_reference,
)
