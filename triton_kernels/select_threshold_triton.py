"""`select_threshold` on the device: a radix selection in three passes (or a mean in one) whose programs look first whether it is due.

No value is read on the host: the launches are the same in every step, and touch no gradient where no threshold is due. The program
that finishes a parameter's last tile, known by a ticket, draws the conclusion of the pass, so that a pass is one launch.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from functools import lru_cache
from math import ceil, log

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_checks import check_state
from dct_compile.triton_kernels.gradient_tables import is_due, is_nonfinite
from dct_compile.triton_kernels.layout import TILE, GradientLayout, gradient_layout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_stored, load_float
from dct_compile.triton_kernels.select_threshold import constant_threshold, selections

DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, width) of the digits of a magnitude's 31 bits, from the highest on."""
SELECTION_COLUMNS = 9
STATE_COLUMNS = 6
"""Scratch of one selection: whether a W is not finite, digits found so far, rank among what begins with them, a ticket for each pass."""


@jit
def load_sum(grad_ptr, residual_ptr, selection, samples, inside, GRAD: tl.constexpr, FEEDBACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """W at sample numbers ``samples``."""
    offsets = samples * tl.load(selection + 4)
    w = load_float(grad_ptr + tl.load(selection + 1) + offsets, inside, GRAD)
    if FEEDBACK:
        w += tl.load(residual_ptr + tl.load(selection + 2) + offsets, mask=inside, other=0.0)
    return w


@jit
def is_last(ticket_ptr, tiles):  # type: ignore[no-untyped-def]
    """Whether all other programs of this selection have written what they know: the last one may read it."""
    tl.debug_barrier()
    return tl.atomic_add(ticket_ptr, 1) == tiles - 1


@jit
def digit_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel], bfloat16 as int16
    residual_ptr,  # float32 [state_numel]
    counters_ptr,  # int64 [S, 4]
    selections_ptr,  # int64 [count, 9]
    tiles_ptr,  # int64 [tiles, 2]: selection, first sample
    state_ptr,  # int64 [count, 6], zero before the first pass
    histogram_ptr,  # int64 [count, 2 ** WIDTH], zero before
    threshold_ptr,  # float32 [S]: written in the last pass
    interval,
    PASS: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """Counts the next digit of a tile's magnitudes that begin with the digits found so far; the last program finds the digit."""
    tile = tl.program_id(0).to(tl.int64)
    number = tl.load(tiles_ptr + tile * 2)
    selection = selections_ptr + number * 9
    state = state_ptr + number * 6
    if is_due(counters_ptr + tl.load(selection) * 4, interval, GEOMETRIC) & (tl.load(state) == 0):
        samples = tl.load(tiles_ptr + tile * 2 + 1) + tl.arange(0, TILE)
        inside = samples < tl.load(selection + 5)
        w = load_sum(grad_ptr, residual_ptr, selection, samples, inside, GRAD, FEEDBACK)
        bits = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if tl.max((bits >= 0x7F800000).to(tl.int32), axis=0) != 0:
            tl.atomic_max(state, 1)
        counted = inside & ((bits >> SHIFT) >> WIDTH == tl.load(state + 1))
        counts = tl.histogram((bits >> SHIFT) & ((1 << WIDTH) - 1), 1 << WIDTH, mask=counted)
        bins = tl.arange(0, 1 << WIDTH)
        tl.atomic_add(histogram_ptr + (number << WIDTH) + bins, counts.to(tl.int64), mask=counts != 0)
        if is_last(state + 3 + PASS, tl.load(selection + 7)):
            # From the largest digit down. What other programs wrote is read past the first level of cache.
            found = tl.load(histogram_ptr + (number << WIDTH) + ((1 << WIDTH) - 1 - bins), cache_modifier=".cg")
            rank = tl.load(state + 2) if PASS else tl.load(selection + 8)
            skipped = tl.cumsum(found, axis=0) < rank
            prefix = (tl.load(state + 1) << WIDTH) | ((1 << WIDTH) - 1 - tl.sum(skipped.to(tl.int64), axis=0))
            tl.store(state + 1, prefix)
            tl.store(state + 2, rank - tl.sum(tl.where(skipped, found, 0), axis=0))
            if SHIFT == 0:
                tl.store(threshold_ptr + tl.load(selection), prefix.to(tl.int32).to(tl.float32, bitcast=True))


@jit
def mean_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel], bfloat16 as int16
    residual_ptr,  # float32 [state_numel]
    counters_ptr,  # int64 [S, 4]
    selections_ptr,  # int64 [count, 9]
    tiles_ptr,  # int64 [tiles, 2]: selection, first sample
    tickets_ptr,  # int64 [count], zero before
    sums_ptr,  # float64 [tiles]: scratch
    factors_ptr,  # float64 [count]: the factor over the number of samples
    threshold_ptr,  # float32 [S]
    interval,
    GEOMETRIC: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """threshold = mean magnitude times a factor; the order of the summation is fixed. Every sum of a NaN or an infinity is one, too."""
    tile = tl.program_id(0).to(tl.int64)
    number = tl.load(tiles_ptr + tile * 2)
    selection = selections_ptr + number * 9
    if is_due(counters_ptr + tl.load(selection) * 4, interval, GEOMETRIC):
        lanes = tl.arange(0, TILE)
        samples = tl.load(tiles_ptr + tile * 2 + 1) + lanes
        inside = samples < tl.load(selection + 5)
        w = load_sum(grad_ptr, residual_ptr, selection, samples, inside, GRAD, FEEDBACK)
        tl.store(sums_ptr + tile, tl.sum(tl.abs(w).to(tl.float64), axis=0))
        tiles = tl.load(selection + 7)
        if is_last(tickets_ptr + number, tiles):
            first = tl.load(selection + 6)
            total = tl.zeros([TILE], dtype=tl.float64)
            for start in range(0, tiles, TILE):
                total += tl.load(sums_ptr + first + start + lanes, mask=start + lanes < tiles, other=0.0, cache_modifier=".cg")
            mean = (tl.sum(total, axis=0) * tl.load(factors_ptr + number)).to(tl.float32)
            tl.store(threshold_ptr + tl.load(selection), mean, mask=is_nonfinite(mean) == 0)


@lru_cache(maxsize=4096)
def _tables(layout: GradientLayout, density: float, method: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On the device: selections (segment, offsets, elements, stride, samples, first tile, tiles, rank), tiles, factors of the means."""
    rows: list[list[int]] = []
    tiles: list[Tensor] = []
    factors: list[float] = []
    first_tile = 0
    for number, part in enumerate(selections(layout, density, method)):
        samples = ceil(part.numel / part.stride)
        starts = torch.arange(0, samples, TILE)
        rows.append(
            [part.segment, part.grad_offset, part.state_offset, part.numel, part.stride, samples, first_tile, starts.numel(), part.rank]
        )
        tiles.append(torch.stack([torch.full_like(starts, number), starts], dim=1))
        first_tile += starts.numel()
        factors.append(-log(density) / samples)
    table = torch.tensor(rows, dtype=torch.int64).view(-1, SELECTION_COLUMNS)
    tile_table = torch.cat(tiles or [torch.empty(0, 2, dtype=torch.int64)])
    return table.to(device), tile_table.to(device), torch.tensor(factors, dtype=torch.float64).to(device)


@torch.no_grad()
def select_threshold_triton(
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
    """`select_threshold_reference` without a host sync: whether a threshold is due is decided on the device, in each launch."""
    layout = gradient_layout(tuple(segments), block, chunks, chunk, 1.0, torch.float32)
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    table, tiles, factors = _tables(layout, density, method, grad.device)
    count = table.shape[0]
    if count == 0:
        return
    constant = constant_threshold(density, method, fixed)
    if constant is not None:
        threshold.data.index_fill_(0, table.select(1, 0), constant)
        return
    source = (as_stored(grad.contiguous()), residual, counters, table, tiles)
    due = {"GEOMETRIC": refresh_warmup != "off", "GRAD": CODES[grad.dtype], "TILE": TILE, "FEEDBACK": error_feedback}
    grid = (tiles.shape[0],)
    if method == "laplace":
        tickets = torch.zeros(count, dtype=torch.int64, device=grad.device)
        sums = torch.empty(tiles.shape[0], dtype=torch.float64, device=grad.device)
        mean_kernel[grid](*source, tickets, sums, factors, threshold, refresh_interval, **due)
        return
    scratch = torch.zeros(count * (STATE_COLUMNS + sum(1 << width for _, width in DIGITS)), dtype=torch.int64, device=grad.device)
    state, *histograms = scratch.split([count * STATE_COLUMNS, *(count << width for _, width in DIGITS)])
    for number, ((shift, width), histogram) in enumerate(zip(DIGITS, histograms, strict=True)):
        digit = {"PASS": number, "SHIFT": shift, "WIDTH": width}
        digit_kernel[grid](*source, state, histogram, threshold, refresh_interval, **digit, **due)
