"""The operators of model parallelism: rows packed by threshold (`[Gupta21]`'s DCT-MP) and the codec of embedding exchanges.

A row is the last dimension of a tensor [R, *row_shape]. R may be symbolic; ``row_shape`` is static. Results keep R (or a whole multiple of
it) as leading dimension, so that the splits of a collective keep their meaning. The meaning of each operator is specified by its PyTorch
reference.
"""

import math

import torch
from torch import Tensor

from dct_compile.ops.library import ROWS, define_op
from dct_compile.triton_kernels.cpu.rows import (
    dequantize_rows_cpu,
    gather_rows_cpu,
    pack_rows_cpu,
    quantize_rows_cpu,
    scatter_rows_cpu,
    unpack_rows_cpu,
)
from dct_compile.triton_kernels.layout import RowLayout, quantized_row_bytes
from dct_compile.triton_kernels.quantize import dequantize_rows_reference, quantize_rows_reference
from dct_compile.triton_kernels.quantize_triton import dequantize_rows_triton, quantize_rows_triton
from dct_compile.triton_kernels.row_checks import (
    check_dequantize_rows,
    check_gather_rows,
    check_pack_rows,
    check_quantize_rows,
    check_scatter_rows,
    check_unpack_rows,
)
from dct_compile.triton_kernels.rows_pack import pack_rows_reference
from dct_compile.triton_kernels.rows_pack_triton import pack_rows_triton
from dct_compile.triton_kernels.rows_unpack import gather_rows_reference, scatter_rows_reference, unpack_rows_reference
from dct_compile.triton_kernels.rows_unpack_triton import gather_rows_triton, scatter_rows_triton, unpack_rows_triton


def _pack_rows_fake(x: Tensor, layout: RowLayout, method: str, density: float, fixed: float) -> Tensor:
    return x.new_empty((x.shape[0], layout.inner * layout.row_bytes), dtype=torch.uint8)


def _unpack_rows_fake(payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    rows = payload.shape[0] if addends == 1 else payload.shape[0] // addends
    return payload.new_empty((rows, *layout.row_shape), dtype=dtype)


def _gather_rows_fake(grad: Tensor, payload: Tensor, layout: RowLayout, value_dtype: torch.dtype) -> Tensor:
    return grad.new_empty((payload.shape[0], layout.inner * layout.capacity), dtype=value_dtype)


def _scatter_rows_fake(values: Tensor, payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    return payload.new_empty((payload.shape[0], *layout.row_shape), dtype=dtype)


def _quantize_rows_fake(x: Tensor, seed: Tensor, bits: int) -> Tensor:
    return x.new_empty((x.shape[0], math.prod(x.shape[1:-1]) * quantized_row_bytes(x.shape[-1], bits)), dtype=torch.uint8)


def _dequantize_rows_fake(payload: Tensor, row_shape: list[int], bits: int, dtype: torch.dtype) -> Tensor:
    return payload.new_empty((payload.shape[0], *row_shape), dtype=dtype)


pack_rows = define_op(
    f"pack_rows(Tensor x, {ROWS} layout, str method, float density, float fixed) -> Tensor",
    check=check_pack_rows,
    fake=_pack_rows_fake,
    reference=pack_rows_reference,
    cpu=pack_rows_cpu,
    triton=pack_rows_triton,
)
unpack_rows = define_op(
    f"unpack_rows(Tensor payload, {ROWS} layout, int addends, ScalarType dtype) -> Tensor",
    check=check_unpack_rows,
    fake=_unpack_rows_fake,
    reference=unpack_rows_reference,
    cpu=unpack_rows_cpu,
    triton=unpack_rows_triton,
)
gather_rows = define_op(
    f"gather_rows(Tensor grad, Tensor payload, {ROWS} layout, ScalarType value_dtype) -> Tensor",
    check=check_gather_rows,
    fake=_gather_rows_fake,
    reference=gather_rows_reference,
    cpu=gather_rows_cpu,
    triton=gather_rows_triton,
)
scatter_rows = define_op(
    f"scatter_rows(Tensor values, Tensor payload, {ROWS} layout, int addends, ScalarType dtype) -> Tensor",
    check=check_scatter_rows,
    fake=_scatter_rows_fake,
    reference=scatter_rows_reference,
    cpu=scatter_rows_cpu,
    triton=scatter_rows_triton,
)
quantize_rows = define_op(
    "quantize_rows(Tensor x, Tensor seed, int bits) -> Tensor",
    check=check_quantize_rows,
    fake=_quantize_rows_fake,
    reference=quantize_rows_reference,
    cpu=quantize_rows_cpu,
    triton=quantize_rows_triton,
)
dequantize_rows = define_op(
    "dequantize_rows(Tensor payload, int[] row_shape, int bits, ScalarType dtype) -> Tensor",
    check=check_dequantize_rows,
    fake=_dequantize_rows_fake,
    reference=dequantize_rows_reference,
    cpu=dequantize_rows_cpu,
    triton=dequantize_rows_triton,
)
