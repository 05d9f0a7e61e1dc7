"""`select_threshold` on the device: one launch, which ends at once where no threshold is due.

A radix selection takes four passes over a parameter. The program that finishes the last run of its elements draws the conclusion of a
pass, and the next pass over that parameter waits for it. No value is read on the host.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from math import log

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.gradient_checks import check_state
from dct_compile.triton_kernels.gradient_tables import device_table, is_due, is_nonfinite
from dct_compile.triton_kernels.layout import TILE, GradientLayout, Selection
from dct_compile.triton_kernels.number_formats_triton import CODES, as_float, as_stored
from dct_compile.triton_kernels.select_threshold import SAMPLE_GROUP, constant_threshold, regions, sample_numel
from dct_compile.triton_kernels.tasks_triton import finish_task, take_task, wait_for

PASSES = 4
BINS = 256
"""A magnitude's 31 bits are digits of 8, 8, 8 and 7, from the highest on. Triton counts a digit bit by bit and bin by bin: larger ones
would cost more in arithmetic than a pass over memory."""
RUN = 4 * TILE
"""Samples that a task looks at before it adds to what other tasks have found."""
PART = 1024
"""Samples that `mean_kernel` holds in registers at a time, in float64."""
PROGRAMS = 1024
"""About as many as a device runs at a time; each takes tasks until there are none."""
LANES = 256
WARPS = 8
SELECTION_COLUMNS = 9
STATE_COLUMNS = 8
"""int64 of one selection, zero before: whether a W is not finite, digits found so far, rank among what begins with them, whether its
histograms are cleared, and the tasks of each pass that have arrived, plus one when the digit is found."""


@jit
def load_sum(grad_ptr, residual_ptr, selection, start, lanes, inside, GRAD: tl.constexpr, FEEDBACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """W at sample numbers ``start + lanes``, of groups of 16 elements with others between; ``start`` begins a group."""
    between = tl.load(selection + 4)
    offsets = start + start // 16 * between + (lanes + lanes // 16 * between.to(tl.int32))
    w = as_float(tl.load(grad_ptr + tl.load(selection + 1) + offsets, mask=inside, other=0), GRAD)
    if FEEDBACK:
        w += tl.load(residual_ptr + tl.load(selection + 2) + offsets, mask=inside, other=0.0)
    return w


@jit
def is_any_due(counters_ptr, selections_ptr, selections, interval, GEOMETRIC: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the threshold of any parameter is due."""
    due = tl.zeros([LANES], dtype=tl.int1)
    for first in range(0, selections, LANES):
        number = tl.minimum(first + tl.arange(0, LANES), selections - 1)
        due |= is_due(counters_ptr + tl.load(selections_ptr + number * 9) * 4, interval, GEOMETRIC)
    return tl.max(due.to(tl.int32), axis=0) != 0


@jit
def count_digit(  # type: ignore[no-untyped-def]
    step,  # of the four passes
    run,
    grad_ptr,
    residual_ptr,
    selection,
    state,
    histogram,
    threshold_ptr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    BINS: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """Counts the next digit of a run's magnitudes that begin with the digits found so far; the last run to arrive finds the digit."""
    runs = tl.load(selection + 7)
    width = tl.where(step == 3, 7, 8)
    shift = tl.maximum(23 - step * 8, 0)
    wait_for(state + 3 + step, tl.where(step == 0, 1, runs + 1))
    prefix = tl.load(state + 1)
    bins = tl.arange(0, BINS)
    lanes = tl.arange(0, TILE)
    counts = tl.zeros([BINS], dtype=tl.int32)
    nonfinite = tl.zeros([TILE], dtype=tl.int32)
    for part in range(0, RUN, TILE):
        start = tl.load(run + 1) + part
        inside = start + lanes < tl.load(selection + 5)
        bits = load_sum(grad_ptr, residual_ptr, selection, start, lanes, inside, GRAD, FEEDBACK).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        nonfinite |= (bits >= 0x7F800000).to(tl.int32)
        counted = inside & ((bits >> shift) >> width == prefix)
        counts += tl.histogram((bits >> shift) & ((1 << width) - 1), BINS, mask=counted)
    if tl.max(nonfinite, axis=0) != 0:
        tl.atomic_max(state, 1)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts != 0)
    if finish_task(state + 4 + step) == runs - 1:
        found = tl.load(histogram + (BINS - 1 - bins))  # from the largest digit down
        rank = tl.load(tl.where(step == 0, selection + 8, state + 2))
        skipped = tl.cumsum(found, axis=0) < rank
        prefix = (prefix << width) | (BINS - 1 - tl.sum(skipped.to(tl.int64), axis=0))
        tl.store(state + 1, prefix)
        tl.store(state + 2, rank - tl.sum(tl.where(skipped, found, 0), axis=0))
        if step == 3:
            finite = tl.load(state) == 0
            tl.store(threshold_ptr + tl.load(selection), prefix.to(tl.int32).to(tl.float32, bitcast=True), mask=finite)
        finish_task(state + 4 + step)


@jit
def rank_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel], bfloat16 as int16
    residual_ptr,  # float32 [state_numel]
    counters_ptr,  # int64 [S, 4]
    selections_ptr,  # int64 [selections, 9]
    runs_ptr,  # int64 [runs, 2]: selection, first sample
    threshold_ptr,  # float32 [S]
    interval,
    selections,
    runs,
    histograms_ptr,  # int64 [selections, 4, BINS]: scratch
    state_ptr,  # int64 [selections, STATE_COLUMNS]: zero before
    ticket_ptr,  # int64 [1]: zero before
    GEOMETRIC: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    BINS: tl.constexpr,
    LANES: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """Tasks: each selection's histograms are cleared, then each run is looked at in the first pass, in the second, and so on."""
    if is_any_due(counters_ptr, selections_ptr, selections, interval, GEOMETRIC, LANES):
        task = take_task(ticket_ptr)
        while task < selections + 4 * runs:
            step = (tl.maximum(task - selections, 0) // runs).to(tl.int32)
            run = runs_ptr + tl.maximum(task - selections, 0) % runs * 2
            number = task if task < selections else tl.load(run)
            selection = selections_ptr + number * 9
            state = state_ptr + number * 8
            histogram = histograms_ptr + (number * 4 + step) * BINS
            if is_due(counters_ptr + tl.load(selection) * 4, interval, GEOMETRIC):
                if task < selections:
                    for digit in range(0, 4):
                        tl.store(histogram + digit * BINS + tl.arange(0, BINS), tl.zeros([BINS], dtype=tl.int64))
                    finish_task(state + 3)
                else:
                    count_digit(
                        step, run, grad_ptr, residual_ptr, selection, state, histogram, threshold_ptr, GRAD, TILE, RUN, BINS, FEEDBACK
                    )
            task = take_task(ticket_ptr)


@jit
def mean_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel], bfloat16 as int16
    residual_ptr,  # float32 [state_numel]
    counters_ptr,  # int64 [S, 4]
    selections_ptr,  # int64 [selections, 9]
    runs_ptr,  # int64 [runs, 2]: selection, first sample
    threshold_ptr,  # float32 [S]
    interval,
    factors_ptr,  # float64 [selections]: the factor over the number of samples
    sums_ptr,  # float64 [runs]: scratch
    arrived_ptr,  # int64 [selections]: zero before
    GEOMETRIC: tl.constexpr,
    GRAD: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """threshold = mean magnitude times a factor; the order of the summation is fixed. Every sum of a NaN or an infinity is one, too."""
    run = tl.program_id(0).to(tl.int64)
    number = tl.load(runs_ptr + run * 2)
    selection = selections_ptr + number * 9
    if is_due(counters_ptr + tl.load(selection) * 4, interval, GEOMETRIC):
        lanes = tl.arange(0, PART)
        total = tl.zeros([PART], dtype=tl.float64)
        for part in range(0, RUN, PART):
            start = tl.load(runs_ptr + run * 2 + 1) + part
            inside = start + lanes < tl.load(selection + 5)
            total += tl.abs(load_sum(grad_ptr, residual_ptr, selection, start, lanes, inside, GRAD, FEEDBACK)).to(tl.float64)
        tl.store(sums_ptr + run, tl.sum(total, axis=0))
        runs = tl.load(selection + 7)
        if finish_task(arrived_ptr + number) == runs - 1:
            total = tl.zeros([PART], dtype=tl.float64)
            for first in range(0, runs, PART):
                total += tl.load(sums_ptr + tl.load(selection + 6) + first + lanes, mask=first + lanes < runs, other=0.0)
            mean = (tl.sum(total, axis=0) * tl.load(factors_ptr + number)).to(tl.float32)
            tl.store(threshold_ptr + tl.load(selection), mean, mask=is_nonfinite(mean) == 0)


@jit
def constant_kernel(selections_ptr, threshold_ptr, constant):  # type: ignore[no-untyped-def]
    """threshold = constant."""
    tl.store(threshold_ptr + tl.load(selections_ptr + tl.program_id(0).to(tl.int64) * 9), constant)


@device_table
def _tables(layout: GradientLayout, selection: Selection, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On the device: selections (segment, offsets, elements, those between groups, samples, first run, runs, rank), runs, factors."""
    rows: list[list[int]] = []
    runs: list[Tensor] = []
    factors: list[float] = []
    first_run = 0
    for number, part in enumerate(regions(layout, selection)):
        samples = sample_numel(part.numel, part.stride)
        between = SAMPLE_GROUP * (part.stride - 1)
        starts = torch.arange(0, samples, RUN)
        rows.append([part.segment, part.grad_offset, part.state_offset, part.numel, between, samples, first_run, starts.numel(), part.rank])
        runs.append(torch.stack([torch.full_like(starts, number), starts], dim=1))
        first_run += starts.numel()
        factors.append(-log(selection.density) / samples)
    table = torch.tensor(rows, dtype=torch.int64).view(-1, SELECTION_COLUMNS)
    run_table = torch.cat(runs or [torch.empty(0, 2, dtype=torch.int64)])
    return table.to(device), run_table.to(device), torch.tensor(factors, dtype=torch.float64).to(device)


@torch.no_grad()
def select_threshold_triton(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    """`select_threshold_reference` in one launch, without a host sync: whether a threshold is due is decided on the device."""
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    table, runs, factors = _tables(layout, selection, grad.device)
    count = table.shape[0]
    if count == 0:
        return
    constant = constant_threshold(selection)
    if constant is not None:
        launch(constant_kernel, (count,))(table, threshold, constant)
        return
    source = (as_stored(grad.contiguous()), residual, counters, table, runs, threshold, selection.refresh_interval)
    options = {"GEOMETRIC": selection.refresh_warmup != "off", "GRAD": CODES[grad.dtype], "RUN": RUN, "FEEDBACK": error_feedback}
    if selection.method == "laplace":
        sums = torch.empty(runs.shape[0], dtype=torch.float64, device=grad.device)
        arrived = torch.zeros(count, dtype=torch.int64, device=grad.device)
        launch(mean_kernel, (runs.shape[0],))(*source, factors, sums, arrived, **options, PART=PART, num_warps=WARPS)
        return
    histograms = torch.empty(count, PASSES, BINS, dtype=torch.int64, device=grad.device)
    state, ticket = torch.zeros(count * STATE_COLUMNS + 1, dtype=torch.int64, device=grad.device).split([count * STATE_COLUMNS, 1])
    scratch = (count, runs.shape[0], histograms, state, ticket)
    programs = min(count + PASSES * runs.shape[0], PROGRAMS)
    launch(rank_kernel, (programs,))(*source, *scratch, **options, TILE=TILE, BINS=BINS, LANES=LANES, num_warps=WARPS)
