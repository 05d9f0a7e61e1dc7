"""The gradient operators of `[Gupta21]`'s DCT-DP: `select_threshold`, `threshold_pack`, `unpack_accumulate`, `repack`.

The geometry arguments (``segments`` as offset, numel, offset, numel, ...; ``block``, ``chunks``, ``chunk``, ``capacity_fraction``,
``value_dtype``) are those of `layout.gradient_layout`. What each operator means is said by its PyTorch reference.
"""

import torch
from torch import Tensor

from dct_compile.ops.library import define_op
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.gradient import repack_cpu, select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu
from dct_compile.triton_kernels.layout import gradient_layout
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.repack_triton import repack_triton
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.threshold_pack_triton import threshold_pack_triton
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_accumulate_triton

_SELECTION = "float density, str method, float fixed, int refresh_interval, str refresh_warmup"
_LAYOUT = "int[] segments, int block, int chunks, int chunk, float capacity_fraction, ScalarType value_dtype"


def _select_threshold_fake(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    density: float,
    method: str,
    fixed: float,
    refresh_interval: int,
    refresh_warmup: str,
    error_feedback: bool,
) -> None:
    return None


def _threshold_pack_fake(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    error_feedback: bool,
) -> Tensor:
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    return grad.new_empty(layout.payload_bytes, dtype=torch.uint8)


def _unpack_accumulate_fake(
    gathered: Tensor,
    dense: Tensor | None,
    numel: int,
    dtype: torch.dtype,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    divisor: int,
) -> Tensor:
    return gathered.new_empty(numel, dtype=dtype)


def _repack_fake(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    density: float,
    method: str,
    fixed: float,
    refresh_interval: int,
    refresh_warmup: str,
    error_feedback: bool,
) -> Tensor:
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    return gathered.new_empty(layout.payload_bytes)


select_threshold = define_op(
    "select_threshold(Tensor grad, Tensor residual, Tensor(a!) threshold, Tensor counters, int[] segments, int block, int chunks,"
    f" int chunk, {_SELECTION}, bool error_feedback) -> ()",
    fake=_select_threshold_fake,
    cpu=select_threshold_cpu,
    cuda=select_threshold_triton if HAS_TRITON else select_threshold_reference,
)
threshold_pack = define_op(
    f"threshold_pack(Tensor grad, Tensor(a!) residual, Tensor threshold, Tensor(b!) counters, {_LAYOUT}, bool error_feedback) -> Tensor",
    fake=_threshold_pack_fake,
    cpu=threshold_pack_cpu,
    cuda=threshold_pack_triton if HAS_TRITON else threshold_pack_reference,
)
unpack_accumulate = define_op(
    f"unpack_accumulate(Tensor gathered, Tensor? dense, int numel, ScalarType dtype, {_LAYOUT}, int divisor) -> Tensor",
    fake=_unpack_accumulate_fake,
    cpu=unpack_accumulate_cpu,
    cuda=unpack_accumulate_triton if HAS_TRITON else unpack_accumulate_reference,
)
repack = define_op(
    "repack(Tensor gathered, Tensor(a!) residual, Tensor(b!) threshold, Tensor(c!) counters,"
    f" {_LAYOUT}, {_SELECTION}, bool error_feedback) -> Tensor",
    fake=_repack_fake,
    cpu=repack_cpu,
    cuda=repack_triton if HAS_TRITON else repack_reference,
)
