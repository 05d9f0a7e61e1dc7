"""The compiled CPU versions of the gradient ops. Same signatures as the references; where there is no compiler they are the references."""

from functools import lru_cache
from math import log

import torch
from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import DOUBLE, DTYPE_CODES, INT, POINTER, cpu_function
from dct_compile.triton_kernels.gradient_checks import check_gathered, check_state
from dct_compile.triton_kernels.layout import GradientLayout, gradient_layout
from dct_compile.triton_kernels.select_threshold import constant_threshold, select_threshold_reference, selections
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.unpack_accumulate import uncovered_ranges, unpack_accumulate_reference

_SELECT = (POINTER, INT, POINTER, POINTER, POINTER, POINTER, INT, INT, DOUBLE, INT, INT, INT)
_PACK = (POINTER, INT, POINTER, POINTER, POINTER, POINTER, INT, POINTER, INT)
_UNPACK = (POINTER, INT, POINTER, POINTER, INT, POINTER, INT, INT, POINTER, INT, INT)

_RANK, _MEAN, _CONSTANT = 0, 1, 2


@lru_cache(maxsize=4096)
def _geometry(layout: GradientLayout) -> Tensor:
    """The layout as the array that gradient.h describes."""
    head = [layout.block, layout.index_bytes, layout.max_count, layout.blocks_per_chunk, layout.capacity, layout.counts_offset]
    head += [layout.indices_offset, layout.chunk_bytes, layout.payload_chunks, DTYPE_CODES[layout.value_dtype], len(layout.segments)]
    head += [sum(piece.blocks for piece in layout.pieces), layout.state_numel, len(layout.pieces)]
    for p in layout.pieces:
        head += [p.segment, p.chunk, p.grad_offset, p.state_offset, p.numel, p.first_block, p.blocks, p.capacity]
    return torch.tensor(head, dtype=torch.int64)


@lru_cache(maxsize=4096)
def _selection_table(layout: GradientLayout, density: float, method: str) -> Tensor:
    rows = [[s.segment, s.grad_offset, s.state_offset, s.numel, s.stride, s.rank] for s in selections(layout, density, method)]
    return torch.tensor(rows, dtype=torch.int64)


@lru_cache(maxsize=4096)
def _range_table(layout: GradientLayout, numel: int) -> Tensor:
    return torch.tensor(uncovered_ranges(layout, numel), dtype=torch.int64)


def select_threshold_cpu(
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
    """`select_threshold_reference`, compiled: two to four passes over the memory, only at refresh steps."""
    function = cpu_function("dct_select_threshold", _SELECT)
    if function is None:
        select_threshold_reference(
            grad,
            residual,
            threshold,
            counters,
            segments,
            block,
            chunks,
            chunk,
            density,
            method,
            fixed,
            refresh_interval,
            refresh_warmup,
            error_feedback,
        )
        return
    layout = gradient_layout(tuple(segments), block, chunks, chunk, 1.0, torch.float32)
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    table = _selection_table(layout, density, method)
    constant = constant_threshold(density, method, fixed)
    if constant is not None:
        code, factor = _CONSTANT, constant
    else:
        code, factor = (_MEAN, -log(density)) if method == "laplace" else (_RANK, 0.0)
    grad = grad.contiguous()
    function(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        residual.data_ptr() if error_feedback else None,
        threshold.data_ptr(),
        counters.data_ptr(),
        table.data_ptr(),
        table.shape[0],
        code,
        factor,
        refresh_interval,
        refresh_warmup != "off",
        torch.get_num_threads(),
    )


def threshold_pack_cpu(
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
    """`threshold_pack_reference`, compiled: gradient and residual are read once (and the gradient's exponents once before)."""
    function = cpu_function("dct_threshold_pack", _PACK)
    if function is None:
        return threshold_pack_reference(
            grad, residual, threshold, counters, segments, block, chunks, chunk, capacity_fraction, value_dtype, error_feedback
        )
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    grad = grad.contiguous()
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    function(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        residual.data_ptr(),
        threshold.data_ptr(),
        counters.data_ptr(),
        _geometry(layout).data_ptr(),
        error_feedback,
        payload.data_ptr(),
        torch.get_num_threads(),
    )
    return payload


def unpack_accumulate_cpu(
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
    """`unpack_accumulate_reference`, compiled: the output is written once, each block's sum is formed in cache."""
    function = cpu_function("dct_unpack_accumulate", _UNPACK)
    if function is None:
        return unpack_accumulate_reference(
            gathered, dense, numel, dtype, segments, block, chunks, chunk, capacity_fraction, value_dtype, divisor
        )
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    payloads = check_gathered(gathered, layout, dense, numel)
    ranges = _range_table(layout, numel)
    gathered = gathered.contiguous()
    dense = None if dense is None else dense.to(dtype).contiguous()
    result = torch.empty(numel, dtype=dtype)
    function(
        gathered.data_ptr(),
        payloads,
        None if dense is None else dense.data_ptr(),
        ranges.data_ptr(),
        ranges.shape[0],
        result.data_ptr(),
        numel,
        DTYPE_CODES[dtype],
        _geometry(layout).data_ptr(),
        divisor,
        torch.get_num_threads(),
    )
    return result
