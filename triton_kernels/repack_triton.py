"""`repack` on the device: the sum of a tile's payload entries goes on to be packed by the program that formed it.

Where a threshold is due the sum of the whole parameter is needed first: such tiles are only summed, and the launch that follows the
selection stages them. Three launches: sum, select, pack;
one more before them lets thresholds that are not due follow the step before.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.layout import GradientLayout, Selection
from dct_compile.triton_kernels.pack_kernel_triton import STAGE_DUE, STAGE_NONE, is_piece_due
from dct_compile.triton_kernels.pack_stage_triton import stage_tile
from dct_compile.triton_kernels.select_threshold import constant_threshold
from dct_compile.triton_kernels.select_threshold_triton import choose_thresholds, hold_thresholds, select_threshold_triton
from dct_compile.triton_kernels.threshold_pack_triton import Packer
from dct_compile.triton_kernels.tuples_triton import named
from dct_compile.triton_kernels.unpack_accumulate_triton import STEP, gathered_arguments
from dct_compile.triton_kernels.unpack_kernels_triton import accumulate_tile


@jit
def repack_tile(grad, gathered, state, schedule, tables, staging, payload, wire, form, STEP: tl.constexpr, CONSTANT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a tile of the owner's sum. Where the threshold is known, stages it by `stage_tile`."""
    accumulate_tile(gathered, tables, grad, wire, form.PART, form.TILE, STEP)
    tile = tl.program_id(0).to(tl.int64)
    due = False
    if not CONSTANT:
        due = is_piece_due(tile, state.counters, tables, schedule)
    if not due:
        stage_tile(tile, grad, state, tables, staging, payload, wire, form)


@jit
def repack_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # float32 [state_numel]: out, the sum; from here on to the control as in `pack_kernel`
    residual_ptr,
    threshold_ptr,
    counters_ptr,
    interval,
    tiles_ptr,
    tile_count,
    pieces_ptr,
    payload_ptr,  # uint8 [chunk_bytes]: the scales are written
    staged_ptr,
    indices_ptr,
    counts_ptr,
    found_ptr,
    control_ptr,
    payloads_ptr,  # from here on the fields of `Gathered`
    reached_ptr,
    rounds,
    chunks,
    blocks_per_chunk,
    capacity,
    CONSTANT: tl.constexpr,  # no threshold is ever due
    GEOMETRIC: tl.constexpr,
    HOLD: tl.constexpr,
    chunk_bytes,  # from here on the fields of `Wire` and `Format`
    values_offset,
    counts_offset,
    indices_offset,
    VALUE: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    GRAD: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Executes `repack_tile` with tuples made of its arguments."""
    repack_tile(
        grad_ptr,
        named("Gathered")(payloads_ptr, reached_ptr, rounds, chunks, blocks_per_chunk, capacity),
        named("State")(residual_ptr, threshold_ptr, counters_ptr),
        named("Schedule")(interval, GEOMETRIC, HOLD),
        named("Tables")(tiles_ptr, tile_count, pieces_ptr),
        named("Staging")(staged_ptr, indices_ptr, counts_ptr, found_ptr, control_ptr + 4),
        payload_ptr,
        named("Wire")(chunk_bytes, values_offset, counts_offset, indices_offset, VALUE, INDEX_BYTES, MAX_COUNT, WHOLE, BLOCK, CHUNKS),
        named("Format")(GRAD, PART, TILE, FEEDBACK),
        STEP,
        CONSTANT,
    )


@torch.no_grad()
def repack_triton(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> Tensor:
    """Computes `repack_reference` with Triton. No host sync; the same bytes in every run."""
    total = torch.empty(layout.state_numel, dtype=torch.float32, device=gathered.device)
    state = (residual, threshold, counters)
    packer = Packer.create(layout, state, error_feedback)
    if not layout.segments:
        return packer.payload
    constant = constant_threshold(selection) is not None
    if constant:
        select_threshold_triton(total, *state, layout, selection, error_feedback)
    interval, geometric = selection.refresh_interval, selection.refresh_warmup != "off"
    hold_thresholds(threshold, counters, layout, selection)
    if packer.tiles.shape[0]:
        launch(repack_kernel, (packer.tiles.shape[0],))(
            *packer.stage_arguments(total, interval),
            **gathered_arguments(gathered, layout),
            CONSTANT=constant,
            GEOMETRIC=geometric,
            HOLD=selection.hold,
            STEP=STEP,
            **packer.stage_options(total),
        )
        if not constant:
            choose_thresholds(total, *state, layout, selection, error_feedback)
    return packer.pack(total, STAGE_NONE if constant else STAGE_DUE, interval, geometric, selection.hold)
