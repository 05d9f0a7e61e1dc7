"""The compiled CPU versions of the gradient ops. Same signatures as the references; where there is no compiler they are the references."""

from functools import lru_cache
from math import log
from typing import Any

import torch
from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import DOUBLE, DTYPE_CODES, INT, POINTER, VALUE_DTYPE_CODES, cpu_function, dtype_code
from dct_compile.triton_kernels.gradient_checks import check_gathered, check_state
from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, gradient_layout
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.select_threshold import constant_threshold, select_threshold_reference, selections
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.unpack_accumulate import uncovered_ranges, unpack_accumulate_reference

_STATE = (POINTER, POINTER, POINTER)
_SELECTING = (POINTER, INT, INT, DOUBLE, INT, INT)
_SELECT = (POINTER, INT, *_STATE, *_SELECTING, INT)
_PACK = (POINTER, INT, *_STATE, POINTER, POINTER, INT)
_UNPACK = (POINTER, INT, POINTER, POINTER, INT, POINTER, INT, INT, POINTER, INT, INT)
_REPACK = (POINTER, INT, *_STATE, *_SELECTING, POINTER, POINTER, INT)

_RANK, _MEAN, _CONSTANT = 0, 1, 2
_GROUP = 64


@lru_cache(maxsize=4096)
def _geometry(layout: GradientLayout) -> Tensor:
    """The layout as the array that gradient.h describes; raises ValueError where the kernels do not know its block or value dtype."""
    if layout.block not in [1 << bits for bits in range(_GROUP.bit_length() - 1, WHOLE_PIECE.bit_length())]:
        raise ValueError(f"block is {layout.block}: expected a power of two from {_GROUP} to {WHOLE_PIECE}")
    value_code = dtype_code("value_dtype", layout.value_dtype, VALUE_DTYPE_CODES)
    head = [layout.block, layout.index_bytes, layout.max_count, layout.capacity, layout.values_offset, layout.counts_offset]
    head += [layout.indices_offset, layout.chunk_bytes, layout.payload_chunks, value_code, len(layout.segments)]
    head += [layout.state_numel, len(layout.pieces)]
    for p in layout.pieces:
        head += [p.segment, p.chunk, p.grad_offset, p.state_offset, p.numel, p.first_block, p.blocks, p.first_tile, p.tiles, p.capacity]
    return torch.tensor(head, dtype=torch.int64)


@lru_cache(maxsize=4096)
def _selection_table(layout: GradientLayout, density: float, method: str) -> Tensor:
    rows = [[s.segment, s.grad_offset, s.state_offset, s.numel, s.stride, s.rank] for s in selections(layout, density, method)]
    return torch.tensor(rows, dtype=torch.int64)


@lru_cache(maxsize=4096)
def _range_table(layout: GradientLayout, numel: int) -> Tensor:
    return torch.tensor(uncovered_ranges(layout, numel), dtype=torch.int64)


def _state_pointers(residual: Tensor, threshold: Tensor, counters: Tensor, error_feedback: bool) -> tuple[int | None, int, int]:
    return residual.data_ptr() if error_feedback else None, threshold.data_ptr(), counters.data_ptr()


def _selecting(table: Tensor, density: float, method: str, fixed: float, interval: int, warmup: str) -> tuple[Any, ...]:
    """The arguments that gradient_kernels.h collects in ``Selecting``; ``table`` must live as long as they are used."""
    constant = constant_threshold(density, method, fixed)
    if constant is not None:
        code, factor = _CONSTANT, constant
    else:
        code, factor = (_MEAN, -log(density)) if method == "laplace" else (_RANK, 0.0)
    return table.data_ptr(), table.shape[0], code, factor, interval, warmup != "off"


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
    """`select_threshold_reference`, compiled: one pass over the memory, only at refresh steps."""
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
    grad = grad.contiguous()
    function(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        *_state_pointers(residual, threshold, counters, error_feedback),
        *_selecting(table, density, method, fixed, refresh_interval, refresh_warmup),
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
    """`threshold_pack_reference`, compiled: gradient and residual are read once, and the residual is written once."""
    function = cpu_function("dct_threshold_pack", _PACK)
    if function is None:
        return threshold_pack_reference(
            grad, residual, threshold, counters, segments, block, chunks, chunk, capacity_fraction, value_dtype, error_feedback
        )
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    geometry = _geometry(layout)
    grad = grad.contiguous()
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    function(
        grad.data_ptr(),
        DTYPE_CODES[grad.dtype],
        *_state_pointers(residual, threshold, counters, error_feedback),
        geometry.data_ptr(),
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
    """`unpack_accumulate_reference`, compiled: the output is written once, each tile's sum is formed in cache."""
    function = cpu_function("dct_unpack_accumulate", _UNPACK)
    if function is None:
        return unpack_accumulate_reference(
            gathered, dense, numel, dtype, segments, block, chunks, chunk, capacity_fraction, value_dtype, divisor
        )
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    payloads = check_gathered(gathered, layout, dense, numel)
    dtype_number = dtype_code("dtype", dtype, DTYPE_CODES)
    geometry, ranges = _geometry(layout), _range_table(layout, numel)
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
        dtype_number,
        geometry.data_ptr(),
        divisor,
        torch.get_num_threads(),
    )
    return result


def repack_cpu(
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
    """`repack_reference`, compiled: the sum of the payloads is formed in cache and never written, but where a threshold is due."""
    function = cpu_function("dct_repack", _REPACK)
    if function is None:
        return repack_reference(
            gathered,
            residual,
            threshold,
            counters,
            segments,
            block,
            chunks,
            chunk,
            capacity_fraction,
            value_dtype,
            density,
            method,
            fixed,
            refresh_interval,
            refresh_warmup,
            error_feedback,
        )
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    payloads = check_gathered(gathered, layout, None, layout.state_numel)
    total = torch.empty(1).expand(layout.state_numel)  # stands for the sum, which does not exist
    check_state(total, residual, threshold, counters, layout, error_feedback)
    geometry, table = _geometry(layout), _selection_table(layout, density, method)
    gathered = gathered.contiguous()
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    function(
        gathered.data_ptr(),
        payloads,
        *_state_pointers(residual, threshold, counters, error_feedback),
        *_selecting(table, density, method, fixed, refresh_interval, refresh_warmup),
        geometry.data_ptr(),
        payload.data_ptr(),
        torch.get_num_threads(),
    )
    return payload
