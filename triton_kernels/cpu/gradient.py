"""The compiled CPU versions of the gradient ops, with the signatures of the references."""

from functools import lru_cache

import torch
from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import INT, POINTER, VALUE_DTYPE_CODES, cpu_function
from dct_compile.triton_kernels.cpu.structs import (
    BUCKET,
    GATHERED,
    SELECTING,
    STATE,
    UNCOVERED,
    Bucket,
    Gathered,
    Selecting,
    State,
    Uncovered,
)
from dct_compile.triton_kernels.layout import GradientLayout, Selection
from dct_compile.triton_kernels.select_threshold import constant_threshold, regions
from dct_compile.triton_kernels.unpack_accumulate import uncovered_ranges

_SELECT = (BUCKET, STATE, SELECTING, INT)
_PACK = (POINTER, BUCKET, STATE, POINTER, INT)
_UNPACK = (POINTER, GATHERED, UNCOVERED, BUCKET, INT, INT)
_REPACK = (POINTER, GATHERED, STATE, SELECTING, POINTER, INT)

_RANK, _MEAN, _CONSTANT = 0, 1, 2


@lru_cache(maxsize=4096)
def _geometry(layout: GradientLayout) -> Tensor:
    """Returns the layout as the array that gradient.h describes."""
    head = [layout.block, layout.index_bytes, layout.max_count, layout.capacity, layout.values_offset, layout.counts_offset]
    head += [layout.indices_offset, layout.chunk_bytes, layout.payload_chunks, VALUE_DTYPE_CODES[layout.value_dtype], len(layout.segments)]
    head += [layout.state_numel, len(layout.pieces)]
    for p in layout.pieces:
        head += [p.segment, p.chunk, p.grad_offset, p.state_offset, p.numel, p.first_block, p.blocks, p.first_tile, p.tiles, p.capacity]
    return torch.tensor(head, dtype=torch.int64)


@lru_cache(maxsize=4096)
def _range_table(layout: GradientLayout, numel: int) -> Tensor:
    return torch.tensor(uncovered_ranges(layout, numel), dtype=torch.int64)


@lru_cache(maxsize=4096)
def _selecting(layout: GradientLayout, selection: Selection) -> Selecting:
    found = regions(layout, selection)
    rows = [[r.segment, r.grad_offset, r.state_offset, r.numel, r.stride, r.rank, r.target] for r in found]
    table = torch.tensor(rows, dtype=torch.int64)
    factors = torch.tensor([region.mean_factor for region in found], dtype=torch.float64)
    constant = constant_threshold(selection)
    method = _CONSTANT if constant is not None else _MEAN if selection.method == "laplace" else _RANK
    geometric = selection.refresh_warmup != "off"
    head = (table.data_ptr(), table.shape[0], method, constant or 0.0, factors.data_ptr())
    selecting = Selecting(*head, selection.refresh_interval, geometric, selection.hold)
    selecting.tables = table, factors
    return selecting


def select_threshold_cpu(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    """Computes `select_threshold_reference`, compiled: one pass over the memory, only at refresh steps."""
    grad = grad.contiguous()
    state = State.of(residual, threshold, counters, error_feedback)
    cpu_function("dct_select_threshold", _SELECT)(Bucket.of(grad), state, _selecting(layout, selection), torch.get_num_threads())


def threshold_pack_cpu(
    grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> Tensor:
    """Computes `threshold_pack_reference`, compiled: gradient and residual are read once, and the residual is written once."""
    geometry = _geometry(layout)
    grad = grad.contiguous()
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    state = State.of(residual, threshold, counters, error_feedback)
    arguments = (geometry.data_ptr(), Bucket.of(grad), state, payload.data_ptr(), torch.get_num_threads())
    cpu_function("dct_threshold_pack", _PACK)(*arguments)
    return payload


def unpack_accumulate_cpu(
    gathered: Tensor, dense: Tensor | None, numel: int, dtype: torch.dtype, layout: GradientLayout, divisor: int
) -> Tensor:
    """Computes `unpack_accumulate_reference`, compiled: the output is written once, each tile's sum is formed in cache."""
    result = torch.empty(numel, dtype=dtype)
    unpack_into_cpu(result, gathered, dense, layout, divisor)
    return result


def unpack_into_cpu(out: Tensor, gathered: Tensor, dense: Tensor | None, layout: GradientLayout, divisor: int) -> None:
    """Computes `unpack_into_reference`, compiled. New memory costs a CPU more than the kernel: the system clears each page first."""
    geometry, ranges = _geometry(layout), _range_table(layout, out.numel())
    gathered = gathered.contiguous()
    dense = None if dense is None else dense.to(out.dtype).contiguous()
    cpu_function("dct_unpack_accumulate", _UNPACK)(
        geometry.data_ptr(),
        Gathered.of(gathered, layout),
        Uncovered(None if dense is None else dense.data_ptr(), ranges.data_ptr(), ranges.shape[0]),
        Bucket.of(out),
        divisor,
        torch.get_num_threads(),
    )


def repack_cpu(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> Tensor:
    """Computes `repack_reference`, compiled. The sum of the payloads is formed in cache. It is written only where a threshold is due."""
    geometry = _geometry(layout)
    gathered = gathered.contiguous()
    payload = torch.empty(layout.payload_bytes, dtype=torch.uint8)
    cpu_function("dct_repack", _REPACK)(
        geometry.data_ptr(),
        Gathered.of(gathered, layout),
        State.of(residual, threshold, counters, error_feedback),
        _selecting(layout, selection),
        payload.data_ptr(),
        torch.get_num_threads(),
    )
    return payload
