"""The gradient operators of `[Gupta21]`'s DCT-DP: `select_threshold`, `threshold_pack`, `unpack_accumulate`, `unpack_into`, `repack`.

The meaning of each operator is specified by its PyTorch reference.
"""

import torch
from torch import Tensor

from dct_compile.ops.library import LAYOUT, SELECTION, define_op
from dct_compile.triton_kernels.cpu.gradient import (
    repack_cpu,
    select_threshold_cpu,
    threshold_pack_cpu,
    unpack_accumulate_cpu,
    unpack_into_cpu,
)
from dct_compile.triton_kernels.gradient_checks import (
    check_repack,
    check_select_threshold,
    check_threshold_pack,
    check_unpack_accumulate,
    check_unpack_into,
)
from dct_compile.triton_kernels.layout import GradientLayout, Selection
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.repack_triton import repack_triton
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.threshold_pack_triton import threshold_pack_triton
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference, unpack_into_reference
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_accumulate_triton, unpack_into_triton


def _select_threshold_fake(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    return None


def _threshold_pack_fake(
    grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> Tensor:
    return grad.new_empty(layout.payload_bytes, dtype=torch.uint8)


def _unpack_accumulate_fake(
    gathered: Tensor, dense: Tensor | None, numel: int, dtype: torch.dtype, layout: GradientLayout, divisor: int
) -> Tensor:
    return gathered.new_empty(numel, dtype=dtype)


def _unpack_into_fake(out: Tensor, gathered: Tensor, dense: Tensor | None, layout: GradientLayout, divisor: int) -> None:
    return None


def _repack_fake(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> Tensor:
    return gathered.new_empty(layout.payload_bytes)


select_threshold = define_op(
    "select_threshold(Tensor grad, Tensor residual, Tensor(a!) threshold, Tensor counters,"
    f" {LAYOUT} layout, {SELECTION} selection, bool error_feedback) -> ()",
    check=check_select_threshold,
    fake=_select_threshold_fake,
    reference=select_threshold_reference,
    cpu=select_threshold_cpu,
    triton=select_threshold_triton,
)
threshold_pack = define_op(
    "threshold_pack(Tensor grad, Tensor(a!) residual, Tensor threshold, Tensor(b!) counters,"
    f" {LAYOUT} layout, bool error_feedback) -> Tensor",
    check=check_threshold_pack,
    fake=_threshold_pack_fake,
    reference=threshold_pack_reference,
    cpu=threshold_pack_cpu,
    triton=threshold_pack_triton,
)
unpack_accumulate = define_op(
    f"unpack_accumulate(Tensor gathered, Tensor? dense, int numel, ScalarType dtype, {LAYOUT} layout, int divisor) -> Tensor",
    check=check_unpack_accumulate,
    fake=_unpack_accumulate_fake,
    reference=unpack_accumulate_reference,
    cpu=unpack_accumulate_cpu,
    triton=unpack_accumulate_triton,
)
unpack_into = define_op(
    f"unpack_into(Tensor(a!) out, Tensor gathered, Tensor? dense, {LAYOUT} layout, int divisor) -> ()",
    check=check_unpack_into,
    fake=_unpack_into_fake,
    reference=unpack_into_reference,
    cpu=unpack_into_cpu,
    triton=unpack_into_triton,
)
repack = define_op(
    "repack(Tensor gathered, Tensor(a!) residual, Tensor(b!) threshold, Tensor(c!) counters,"
    f" {LAYOUT} layout, {SELECTION} selection, bool error_feedback) -> Tensor",
    check=check_repack,
    fake=_repack_fake,
    reference=repack_reference,
    cpu=repack_cpu,
    triton=repack_triton,
)
