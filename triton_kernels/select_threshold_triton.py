"""`select_threshold` on the device: a radix selection (or a mean) whose every launch looks first whether it is due.

No value is read on the host: the launches are the same in every step, and cost no memory traffic where no threshold is due.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from functools import lru_cache
from math import ceil, log

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_checks import check_state
from dct_compile.triton_kernels.gradient_tables import nonfinite_flag
from dct_compile.triton_kernels.layout import GradientLayout, gradient_layout
from dct_compile.triton_kernels.select_threshold import constant_threshold, selections

TILE = 4096
DIGITS = ((20, 11), (10, 10), (0, 10))
"""(shift, width) of the digits of a magnitude's 31 bits, from the highest on."""


@jit
def due_kernel(  # type: ignore[no-untyped-def]
    counters_ptr,  # int64 [S, 4]
    selections_ptr,  # int64 [count, 8]
    due_ptr,  # int32 [count]: out
    interval,
    GEOMETRIC: tl.constexpr,
):
    """`schedule.is_refresh_step` of each selection's parameter."""
    number = tl.program_id(0).to(tl.int64)
    counters = counters_ptr + tl.load(selections_ptr + number * 8) * 4
    step = tl.load(counters)
    gap = step * 0 + interval
    due = 0
    if GEOMETRIC:
        power = step  # the largest power of two that is not above the step: fill the bits below its highest one
        for shift in tl.static_range(0, 6):
            power = power | (power >> (1 << shift))
        gap = tl.minimum(gap, tl.maximum((power - (power >> 1)) // 8, 1))
        due = (tl.load(counters + 3) > 0).to(tl.int32)
    due = due | (step % gap == 0).to(tl.int32)
    tl.store(due_ptr + number, due)


@jit
def magnitude_bits(grad_ptr, residual_ptr, selection, samples, inside, FEEDBACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bits of abs(W) at sample numbers ``samples``: integers in the order of the magnitudes."""
    offsets = samples * tl.load(selection + 4)
    w = tl.load(grad_ptr + tl.load(selection + 1) + offsets, mask=inside, other=0.0).to(tl.float32)
    if FEEDBACK:
        w += tl.load(residual_ptr + tl.load(selection + 2) + offsets, mask=inside, other=0.0)
    return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def histogram_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel]
    residual_ptr,  # float32 [state_numel]
    selections_ptr,  # int64 [count, 8]
    tiles_ptr,  # int64 [tiles, 2]: selection, first sample
    due_ptr,  # int32 [count]
    prefix_ptr,  # int32 [count]: the digits found so far
    histogram_ptr,  # int32 [count, 2 ** WIDTH], zero before
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """Counts the next digit of a tile's magnitudes that begin with the digits found so far."""
    tile = tl.program_id(0).to(tl.int64)
    number = tl.load(tiles_ptr + tile * 2)
    if tl.load(due_ptr + number) != 0:
        selection = selections_ptr + number * 8
        samples = tl.load(tiles_ptr + tile * 2 + 1) + tl.arange(0, TILE)
        inside = samples < tl.load(selection + 5)
        bits = magnitude_bits(grad_ptr, residual_ptr, selection, samples, inside, FEEDBACK)
        counted = inside & ((bits >> SHIFT) >> WIDTH == tl.load(prefix_ptr + number))
        digits = (bits >> SHIFT) & ((1 << WIDTH) - 1)
        counts = tl.histogram(digits, 1 << WIDTH, mask=counted)
        bins = tl.arange(0, 1 << WIDTH)
        tl.atomic_add(histogram_ptr + (number << WIDTH) + bins, counts, mask=counts != 0)


@jit
def digit_kernel(  # type: ignore[no-untyped-def]
    selections_ptr,  # int64 [count, 8]
    due_ptr,  # int32 [count]
    prefix_ptr,  # int32 [count]: the digits found so far, one more after
    rank_ptr,  # int64 [count]: rank among the magnitudes with these digits
    histogram_ptr,  # int32 [count, 2 ** WIDTH]
    threshold_ptr,  # float32 [S]: written with the last digit
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    """The digit of the magnitude with the wanted rank, counted from the largest digit down."""
    number = tl.program_id(0).to(tl.int64)
    if tl.load(due_ptr + number) != 0:
        below = tl.arange(0, 1 << WIDTH)
        counts = tl.load(histogram_ptr + (number << WIDTH) + ((1 << WIDTH) - 1 - below)).to(tl.int64)
        reached = tl.cumsum(counts, axis=0)
        rank = tl.load(rank_ptr + number)
        skipped = reached < rank
        position = tl.sum(skipped.to(tl.int32), axis=0)
        prefix = (tl.load(prefix_ptr + number) << WIDTH) | ((1 << WIDTH) - 1 - position)
        tl.store(prefix_ptr + number, prefix)
        tl.store(rank_ptr + number, rank - tl.sum(tl.where(skipped, counts, 0), axis=0))
        if LAST:
            tl.store(threshold_ptr + tl.load(selections_ptr + number * 8), prefix.to(tl.float32, bitcast=True))


@jit
def sum_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel]
    residual_ptr,  # float32 [state_numel]
    selections_ptr,  # int64 [count, 8]
    tiles_ptr,  # int64 [tiles, 2]: selection, first sample
    due_ptr,  # int32 [count]
    sums_ptr,  # float64 [tiles]: out, where due
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """Sum of the magnitudes of a tile, in float64."""
    tile = tl.program_id(0).to(tl.int64)
    number = tl.load(tiles_ptr + tile * 2)
    if tl.load(due_ptr + number) != 0:
        selection = selections_ptr + number * 8
        samples = tl.load(tiles_ptr + tile * 2 + 1) + tl.arange(0, TILE)
        inside = samples < tl.load(selection + 5)
        bits = magnitude_bits(grad_ptr, residual_ptr, selection, samples, inside, FEEDBACK)
        tl.store(sums_ptr + tile, tl.sum(bits.to(tl.float32, bitcast=True).to(tl.float64), axis=0))


@jit
def mean_kernel(  # type: ignore[no-untyped-def]
    selections_ptr,  # int64 [count, 8]
    due_ptr,  # int32 [count]
    sums_ptr,  # float64 [tiles]
    factors_ptr,  # float64 [count]: the factor over the number of samples
    threshold_ptr,  # float32 [S]
    WIDTH: tl.constexpr,
):
    """threshold = mean magnitude times a factor; the order of the summation is fixed."""
    number = tl.program_id(0).to(tl.int64)
    if tl.load(due_ptr + number) != 0:
        first = tl.load(selections_ptr + number * 8 + 6)
        tiles = tl.load(selections_ptr + number * 8 + 7)
        lanes = tl.arange(0, WIDTH)
        total = tl.zeros([WIDTH], dtype=tl.float64)
        for start in range(0, tiles, WIDTH):
            total += tl.load(sums_ptr + first + start + lanes, mask=start + lanes < tiles, other=0.0)
        mean = tl.sum(total, axis=0) * tl.load(factors_ptr + number)
        tl.store(threshold_ptr + tl.load(selections_ptr + number * 8), mean.to(tl.float32))


@lru_cache(maxsize=4096)
def _tables(layout: GradientLayout, density: float, method: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On the device: selections (segment, offsets, elements, stride, samples, first tile, tiles), tiles, ranks, factors of the means."""
    rows: list[list[int]] = []
    tiles: list[list[int]] = []
    ranks: list[int] = []
    factors: list[float] = []
    for number, part in enumerate(selections(layout, density, method)):
        samples = ceil(part.numel / part.stride)
        starts = range(0, samples, TILE)
        rows.append([part.segment, part.grad_offset, part.state_offset, part.numel, part.stride, samples, len(tiles), len(starts)])
        tiles += [[number, start] for start in starts]
        ranks.append(part.rank)
        factors.append(-log(density) / samples)
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 8)
    tile_table = torch.tensor(tiles, dtype=torch.int64).view(-1, 2)
    return table.to(device), tile_table.to(device), torch.tensor(ranks).to(device), torch.tensor(factors, dtype=torch.float64).to(device)


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
    table, tiles, ranks, factors = _tables(layout, density, method, grad.device)
    count = table.shape[0]
    if count == 0:
        return
    grad = grad.contiguous()
    constant = constant_threshold(density, method, fixed)
    due = torch.ones(count, dtype=torch.int32, device=grad.device)
    if constant is not None:
        held = nonfinite_flag(grad, layout, wanted=due[:1])
        chosen = table[:, 0]
        threshold.data[chosen] = torch.where(held != 0, threshold[chosen], constant)
        return
    due_kernel[(count,)](counters, table, due, refresh_interval, GEOMETRIC=refresh_warmup != "off")
    due *= 1 - nonfinite_flag(grad, layout, wanted=due.amax().view(1))
    grid = (tiles.shape[0],)
    if method == "laplace":
        sums = torch.empty(tiles.shape[0], dtype=torch.float64, device=grad.device)
        sum_kernel[grid](grad, residual, table, tiles, due, sums, TILE=TILE, FEEDBACK=error_feedback)
        mean_kernel[(count,)](table, due, sums, factors, threshold, WIDTH=1024)
        return
    prefix = torch.zeros(count, dtype=torch.int32, device=grad.device)
    rank = ranks.clone()
    for shift, width in DIGITS:
        histogram = torch.zeros(count, 1 << width, dtype=torch.int32, device=grad.device)
        histogram_kernel[grid](
            grad, residual, table, tiles, due, prefix, histogram, SHIFT=shift, WIDTH=width, TILE=TILE, FEEDBACK=error_feedback
        )
        digit_kernel[(count,)](table, due, prefix, rank, histogram, threshold, WIDTH=width, LAST=shift == 0)
