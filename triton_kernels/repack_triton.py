"""`repack` on the device: the sum of a tile's payload entries goes on to be packed by the program that formed it.

Where a threshold is due the sum of the whole parameter is needed first: such tiles are only summed, and the launch that follows the
selection stages them. Three launches: sum, select, pack.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.gradient_checks import check_gathered, check_state
from dct_compile.triton_kernels.gradient_tables import is_due
from dct_compile.triton_kernels.layout import GradientLayout, Selection
from dct_compile.triton_kernels.pack_stage_triton import stage_tile
from dct_compile.triton_kernels.select_threshold import constant_threshold
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack_triton import STAGE_DUE, STAGE_NONE, Packer
from dct_compile.triton_kernels.unpack_accumulate_triton import accumulate_tile, entries_reached, payload_options


@jit
def repack_kernel(  # type: ignore[no-untyped-def]
    gathered_ptr,  # uint8 [rounds, chunk_bytes]
    reached_ptr,  # int64 [rounds, blocks_per_chunk]: entries up to the end of each block
    rounds,
    total_ptr,  # float32 [state_numel]: out, the sum
    residual_ptr,  # float32 [state_numel]
    threshold_ptr,  # float32 [S]
    counters_ptr,  # int64 [S, 4]
    interval,
    tiles_ptr,  # int64 [tiles, 4]
    tiles,
    pieces_ptr,  # int64 [pieces, 7]
    payload_ptr,  # uint8 [chunk_bytes]: the scales are written
    staged_ptr,  # as in pack_kernel, from here to control_ptr
    places_ptr,
    counts_ptr,
    found_ptr,
    control_ptr,
    CONSTANT: tl.constexpr,  # no threshold is ever due
    GEOMETRIC: tl.constexpr,
    chunk_bytes,
    chunks,
    values_offset,
    indices_offset,
    blocks_per_chunk,
    capacity,
    VALUE_TYPE: tl.constexpr,
    INDEX_TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    STEP: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    GRAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """A tile of the owner's sum, and what `stage_tile` makes of it where the threshold is known."""
    accumulate_tile(
        gathered_ptr,
        reached_ptr,
        tiles_ptr,
        pieces_ptr,
        total_ptr,
        rounds,
        chunk_bytes,
        chunks,
        values_offset,
        indices_offset,
        blocks_per_chunk,
        capacity,
        VALUE_TYPE,
        VALUE,
        INDEX_TYPE,
        WHOLE,
        BLOCK,
        PART,
        TILE,
        STEP,
    )
    tile = tl.program_id(0).to(tl.int64)
    due = False
    if not CONSTANT:
        segment = tl.load(pieces_ptr + tl.load(tiles_ptr + tile * 4 + 3) * 7)
        due = is_due(counters_ptr + segment * 4, interval, GEOMETRIC)
    if not due:
        stage_tile(
            tile,
            total_ptr,
            residual_ptr,
            threshold_ptr,
            tiles_ptr,
            tiles,
            pieces_ptr,
            payload_ptr,
            staged_ptr,
            places_ptr,
            counts_ptr,
            found_ptr,
            control_ptr + 4,
            chunk_bytes,
            MAX_COUNT,
            GRAD,
            VALUE,
            BLOCK,
            PART,
            TILE,
            FEEDBACK,
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
    """`repack_reference` with Triton. No host sync; the same bytes in every run."""
    rounds = check_gathered(gathered, layout, None, layout.state_numel)
    total = torch.empty(layout.state_numel, dtype=torch.float32, device=gathered.device)
    check_state(total, residual, threshold, counters, layout, error_feedback)
    packer = Packer.create(layout, residual, threshold, counters, error_feedback)
    if not layout.segments:
        return packer.payload
    state = (residual, threshold, counters)
    constant = constant_threshold(selection) is not None
    if constant:
        select_threshold_triton(total, *state, layout, selection, error_feedback)
    geometric = selection.refresh_warmup != "off"
    if packer.tiles.shape[0]:
        gathered = gathered.contiguous()
        source = (gathered, entries_reached(gathered, layout), rounds, total, *state, selection.refresh_interval)
        options = {**payload_options(layout), **packer.stage_options(total), "CONSTANT": constant, "GEOMETRIC": geometric}
        launch(repack_kernel, (packer.tiles.shape[0],))(*source, *packer.stage_arguments, **options)
        if not constant:
            select_threshold_triton(total, *state, layout, selection, error_feedback)
    return packer.pack(total, STAGE_NONE if constant else STAGE_DUE, selection.refresh_interval, geometric)
