"""The kernels of `select_threshold`.

A radix selection takes four passes over a parameter. The program that finishes the last run of its elements draws the conclusion of a
pass, and the next pass over that parameter waits for it. No value is read on the host.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_due, is_nonfinite
from dct_compile.triton_kernels.number_formats_triton import as_float
from dct_compile.triton_kernels.tasks_triton import finish_task, take_task, wait_for
from dct_compile.triton_kernels.tuples_triton import named


@jit
def load_sum(samples, region, start, lanes, inside):  # type: ignore[no-untyped-def]
    """W at sample numbers ``start + lanes``, of groups of 16 elements with others between; ``start`` begins a group."""
    between = tl.load(region + 4)
    offsets = start + start // 16 * between + (lanes + lanes // 16 * between.to(tl.int32))
    w = as_float(tl.load(samples.grad + tl.load(region + 1) + offsets, mask=inside, other=0), samples.GRAD)
    if samples.FEEDBACK:
        w += tl.load(samples.residual + tl.load(region + 2) + offsets, mask=inside, other=0.0)
    return w


@jit
def is_any_due(regions, region_count, schedule, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns True if the threshold of any parameter is due."""
    due = tl.zeros([LANES], dtype=tl.int1)
    for first in range(0, region_count, LANES):
        number = tl.minimum(first + tl.arange(0, LANES), region_count - 1)
        counters = regions.counters + tl.load(regions.table + number * 10) * 5
        due |= is_due(counters, schedule.interval, schedule.GEOMETRIC, schedule.HOLD)
    return tl.max(due.to(tl.int32), axis=0) != 0


@jit
def count_digit(step, run, samples, region, state, histogram, threshold_ptr, TILE: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counts the next digit of a run's magnitudes that begin with the digits found so far, in one of the four passes (``step``).

    The last run to arrive finds the digit.
    """
    runs = tl.load(region + 7)
    width = tl.where(step == 3, 7, 8)
    shift = tl.maximum(23 - step * 8, 0)
    wait_for(state + 3 + step, tl.where(step == 0, 1, runs + 1))
    prefix = tl.load(state + 1)
    bins = tl.arange(0, BINS)
    lanes = tl.arange(0, TILE)
    counts = tl.zeros([BINS], dtype=tl.int32)
    nonfinite = tl.zeros([TILE], dtype=tl.int32)
    for part in range(0, samples.RUN, TILE):
        start = tl.load(run + 1) + part
        inside = start + lanes < tl.load(region + 5)
        bits = load_sum(samples, region, start, lanes, inside).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        nonfinite |= (bits >= 0x7F800000).to(tl.int32)
        counted = inside & ((bits >> shift) >> width == prefix)
        counts += tl.histogram((bits >> shift) & ((1 << width) - 1), BINS, mask=counted)
    if tl.max(nonfinite, axis=0) != 0:
        tl.atomic_max(state, 1)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts != 0)
    if finish_task(state + 4 + step) == runs - 1:
        found = tl.load(histogram + (BINS - 1 - bins))  # from the largest digit down
        rank = tl.load(tl.where(step == 0, region + 8, state + 2))
        skipped = tl.cumsum(found, axis=0) < rank
        prefix = (prefix << width) | (BINS - 1 - tl.sum(skipped.to(tl.int64), axis=0))
        tl.store(state + 1, prefix)
        tl.store(state + 2, rank - tl.sum(tl.where(skipped, found, 0), axis=0))
        if step == 3:
            finite = tl.load(state) == 0
            tl.store(threshold_ptr + tl.load(region), prefix.to(tl.int32).to(tl.float32, bitcast=True), mask=finite)
        finish_task(state + 4 + step)


@jit
def rank_regions(samples, regions, schedule, scratch, TILE: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tasks: each region's histograms are cleared, then each run is looked at in the first pass, in the second, and so on."""
    region_count, runs = scratch.region_count, scratch.run_count
    if is_any_due(regions, region_count, schedule, LANES):
        task = take_task(scratch.ticket)
        while task < region_count + 4 * runs:
            step = (tl.maximum(task - region_count, 0) // runs).to(tl.int32)
            run = regions.runs + tl.maximum(task - region_count, 0) % runs * 2
            number = task if task < region_count else tl.load(run)
            region = regions.table + number * 10
            state = scratch.state + number * 8
            histogram = scratch.histograms + (number * 4 + step) * BINS
            if is_due(regions.counters + tl.load(region) * 5, schedule.interval, schedule.GEOMETRIC, schedule.HOLD):
                if task < region_count:
                    for digit in range(0, 4):
                        tl.store(histogram + digit * BINS + tl.arange(0, BINS), tl.zeros([BINS], dtype=tl.int64))
                    finish_task(state + 3)
                else:
                    count_digit(step, run, samples, region, state, histogram, regions.threshold, TILE, BINS)
            task = take_task(scratch.ticket)


@jit
def rank_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # the fields of `Samples` are here and at the end
    residual_ptr,
    counters_ptr,  # from here on the fields of `Regions`
    regions_ptr,
    runs_ptr,
    threshold_ptr,
    interval,
    region_count,  # from here on the fields of `RankScratch`
    run_count,
    histograms_ptr,
    state_ptr,
    ticket_ptr,
    GEOMETRIC: tl.constexpr,
    HOLD: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    BINS: tl.constexpr,
    LANES: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """`rank_regions` of tuples."""
    rank_regions(
        named("Samples")(grad_ptr, residual_ptr, RUN, GRAD, FEEDBACK),
        named("Regions")(counters_ptr, regions_ptr, runs_ptr, threshold_ptr),
        named("Schedule")(interval, GEOMETRIC, HOLD),
        named("RankScratch")(region_count, run_count, histograms_ptr, state_ptr, ticket_ptr),
        TILE,
        BINS,
        LANES,
    )


@jit
def mean_of_run(samples, regions, schedule, factors_ptr, sums_ptr, arrived_ptr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """threshold = mean magnitude times a factor; the order of the summation is fixed. Every sum of a NaN or an infinity is one, too."""
    run = tl.program_id(0).to(tl.int64)
    number = tl.load(regions.runs + run * 2)
    region = regions.table + number * 10
    if is_due(regions.counters + tl.load(region) * 5, schedule.interval, schedule.GEOMETRIC, schedule.HOLD):
        lanes = tl.arange(0, PART)
        total = tl.zeros([PART], dtype=tl.float64)
        for part in range(0, samples.RUN, PART):
            start = tl.load(regions.runs + run * 2 + 1) + part
            inside = start + lanes < tl.load(region + 5)
            total += tl.abs(load_sum(samples, region, start, lanes, inside)).to(tl.float64)
        tl.store(sums_ptr + run, tl.sum(total, axis=0))
        runs = tl.load(region + 7)
        if finish_task(arrived_ptr + number) == runs - 1:
            total = tl.zeros([PART], dtype=tl.float64)
            for first in range(0, runs, PART):
                total += tl.load(sums_ptr + tl.load(region + 6) + first + lanes, mask=first + lanes < runs, other=0.0)
            threshold = (tl.sum(total, axis=0) * tl.load(factors_ptr + number)).to(tl.float32)
            tl.store(regions.threshold + tl.load(region), threshold, mask=is_nonfinite(threshold) == 0)


@jit
def mean_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # as in `rank_kernel`, from here to the interval
    residual_ptr,
    counters_ptr,
    regions_ptr,
    runs_ptr,
    threshold_ptr,
    interval,
    factors_ptr,  # float64 [regions]: the factor over the number of samples
    sums_ptr,  # float64 [runs]: scratch
    arrived_ptr,  # int64 [regions]: zero before
    GEOMETRIC: tl.constexpr,
    HOLD: tl.constexpr,
    GRAD: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """`mean_of_run` of tuples."""
    mean_of_run(
        named("Samples")(grad_ptr, residual_ptr, RUN, GRAD, FEEDBACK),
        named("Regions")(counters_ptr, regions_ptr, runs_ptr, threshold_ptr),
        named("Schedule")(interval, GEOMETRIC, HOLD),
        factors_ptr,
        sums_ptr,
        arrived_ptr,
        PART,
    )


@jit
def constant_kernel(regions_ptr, threshold_ptr, constant):  # type: ignore[no-untyped-def]
    """threshold = constant."""
    tl.store(threshold_ptr + tl.load(regions_ptr + tl.program_id(0).to(tl.int64) * 10), constant)


@jit
def hold_kernel(counters_ptr, regions_ptr, threshold_ptr, interval, GEOMETRIC: tl.constexpr, FEWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """threshold = `schedule.held_threshold`, where it is not due."""
    region = regions_ptr + tl.program_id(0).to(tl.int64) * 10
    counters = counters_ptr + tl.load(region) * 5
    kept = tl.load(counters + 4)
    target = tl.load(region + 9)
    if (kept > 0) & (target >= FEWEST) & (is_due(counters, interval, GEOMETRIC, True) == 0):
        numel = tl.load(region + 3)
        factor = numel - target + tl.minimum(kept + tl.load(counters + 3), 2 * target)
        threshold = threshold_ptr + tl.load(region)
        held = tl.load(threshold).to(tl.float64) * factor.to(tl.float64) / numel.to(tl.float64)
        tl.store(threshold, held.to(tl.float32))
