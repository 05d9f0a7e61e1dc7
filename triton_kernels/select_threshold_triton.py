"""`select_threshold` on the device: one launch holds what is not due, one chooses what is due, and ends at once where nothing is."""

from __future__ import annotations

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import launch
from dct_compile.triton_kernels.gradient_tables import device_table
from dct_compile.triton_kernels.layout import TILE, GradientLayout, Selection
from dct_compile.triton_kernels.number_formats_triton import CODES, as_stored
from dct_compile.triton_kernels.schedule import FEWEST
from dct_compile.triton_kernels.select_kernels_triton import constant_kernel, hold_kernel, mean_kernel, rank_kernel
from dct_compile.triton_kernels.select_threshold import SAMPLE_GROUP, constant_threshold, regions, sample_numel

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
REGION_COLUMNS = 10
STATE_COLUMNS = 8
"""int64 of one region, zero before: whether a W is not finite, digits found so far, rank among what begins with them, whether its
histograms are cleared, and the tasks of each pass that have arrived, plus one when the digit is found."""


@device_table
def _tables(layout: GradientLayout, selection: Selection, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On the device: regions (segment, offsets, elements, those between groups, samples, first run, runs, rank, target), runs, factors."""
    rows: list[list[int]] = []
    runs: list[Tensor] = []
    factors: list[float] = []
    first_run = 0
    for number, region in enumerate(regions(layout, selection)):
        samples = sample_numel(region.numel, region.stride)
        between = SAMPLE_GROUP * (region.stride - 1)
        starts = torch.arange(0, samples, RUN)
        extent = (region.segment, region.grad_offset, region.state_offset, region.numel)
        rows.append([*extent, between, samples, first_run, starts.numel(), region.rank, region.target])
        runs.append(torch.stack([torch.full_like(starts, number), starts], dim=1))
        first_run += starts.numel()
        factors.append(region.mean_factor / samples)
    table = torch.tensor(rows, dtype=torch.int64).view(-1, REGION_COLUMNS)
    run_table = torch.cat(runs or [torch.empty(0, 2, dtype=torch.int64)])
    return table.to(device), run_table.to(device), torch.tensor(factors, dtype=torch.float64).to(device)


def hold_thresholds(threshold: Tensor, counters: Tensor, layout: GradientLayout, selection: Selection) -> None:
    """Lets the thresholds that are not due follow what the step before kept, if ``selection`` says so: one launch."""
    table, _, _ = _tables(layout, selection, threshold.device)
    if selection.hold and constant_threshold(selection) is None and table.shape[0]:
        options = {"GEOMETRIC": selection.refresh_warmup != "off", "FEWEST": FEWEST}
        launch(hold_kernel, (table.shape[0],))(counters, table, threshold, selection.refresh_interval, **options)


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
    """`select_threshold_reference` without a host sync: whether a threshold is due is decided on the device."""
    hold_thresholds(threshold, counters, layout, selection)
    choose_thresholds(grad, residual, threshold, counters, layout, selection, error_feedback)


def choose_thresholds(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    """Chooses the thresholds that are due, in one launch."""
    table, runs, factors = _tables(layout, selection, grad.device)
    count = table.shape[0]
    if count == 0:
        return
    constant = constant_threshold(selection)
    if constant is not None:
        launch(constant_kernel, (count,))(table, threshold, constant)
        return
    source = (as_stored(grad.contiguous()), residual, counters, table, runs, threshold, selection.refresh_interval)
    schedule = {"GEOMETRIC": selection.refresh_warmup != "off", "HOLD": selection.hold}
    options = {**schedule, "GRAD": CODES[grad.dtype], "RUN": RUN, "FEEDBACK": error_feedback}
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
