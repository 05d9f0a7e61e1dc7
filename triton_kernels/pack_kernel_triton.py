"""The kernel of `threshold_pack`: one launch, whose first tasks are one pass over memory and whose others touch only what is kept.

The tasks, in their order: each tile is staged (gradient and residual are read once, the residual is written once); each group of tiles is
counted, and the last group to be counted decides what each piece sends and where; each group's staged entries go to the payload, and
what found no room goes back to the residual. Nothing is read on the host, and integers alone decide the order: the bytes are the same in
every run.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_due
from dct_compile.triton_kernels.pack_place_triton import place_group, settle, tally_group
from dct_compile.triton_kernels.pack_stage_triton import stage_tile, undo_tile
from dct_compile.triton_kernels.tasks_triton import finish_task, take_task, wait_for
from dct_compile.triton_kernels.tuples_triton import named

CONTROL_WORDS = 5
"""int32, zero before: tasks taken, tiles staged, groups counted, whether all is settled, whether a W is not finite."""
STAGE_ALL, STAGE_DUE, STAGE_NONE = 0, 1, 2
"""Which tiles `pack_kernel` has to stage: all, those whose threshold is due, or none. `repack` has staged the others."""


@jit
def is_piece_due(tile, counters_ptr, tables, schedule):  # type: ignore[no-untyped-def]
    """Returns True if the threshold is due of the parameter that a tile belongs to."""
    segment = tl.load(tables.pieces + tl.load(tables.tiles + tile * 4 + 3) * 7)
    return is_due(counters_ptr + segment * 5, schedule.interval, schedule.GEOMETRIC, schedule.HOLD)


@jit
def run_task(grad_ptr, state, schedule, tables, staging, tally, payload, control_ptr, wire, form, STAGES: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Executes a task, see the top of this file.

    It stages a tile, counts a group of tiles (the last one settles), or places a group's entries.
    """
    task = take_task(control_ptr).to(tl.int64)
    if STAGES != 2:
        if task < tables.tile_count:
            wanted = True
            if STAGES == 1:
                wanted = is_piece_due(task, state.counters, tables, schedule)
            if wanted:
                stage_tile(task, grad_ptr, state, tables, staging, payload, wire, form)
            finish_task(control_ptr + 1)
        task -= tables.tile_count
    if task >= tally.groups:
        wait_for(control_ptr + 3, 1)
        place_group(task - tally.groups, state.residual, tables, staging, tally, payload, wire, form, STEP)
    elif task >= 0:
        if STAGES != 2:
            wait_for(control_ptr + 1, tables.tile_count)
        held = tl.load(staging.held)
        if held != 0:
            for tile in range(task * tally.GROUP, tl.minimum((task + 1) * tally.GROUP, tables.tile_count)):
                undo_tile(tile, grad_ptr, state, tables, staging, payload, wire, form)
            tl.debug_barrier()
        tally_group(task, tables.tile_count, staging.found, tally)
        if finish_task(control_ptr + 2) == tally.groups - 1:
            settle(state.counters, held, tables, tally)
            finish_task(control_ptr + 3)


@jit
def pack_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel], bfloat16 as int16; read again in held steps
    residual_ptr,  # from here on the fields of `State`, `Schedule`, `Tables`
    threshold_ptr,
    counters_ptr,
    interval,
    tiles_ptr,
    tile_count,
    pieces_ptr,
    payload_ptr,  # uint8 [payload_bytes], zero before
    staged_ptr,  # from here on the fields of `Staging`, whose `held` is the last word of the control, and of `Tally`
    indices_ptr,
    counts_ptr,
    found_ptr,
    control_ptr,  # int32 [CONTROL_WORDS], zero before
    piece_count,
    segment_count,
    reached_ptr,
    sums_ptr,
    windows_ptr,
    STAGES: tl.constexpr,
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
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    STEP: tl.constexpr,
):
    """Executes `run_task` with tuples made of its arguments."""
    groups = tl.maximum(tl.cdiv(tile_count, GROUP), 1)
    run_task(
        grad_ptr,
        named("State")(residual_ptr, threshold_ptr, counters_ptr),
        named("Schedule")(interval, GEOMETRIC, HOLD),
        named("Tables")(tiles_ptr, tile_count, pieces_ptr),
        named("Staging")(staged_ptr, indices_ptr, counts_ptr, found_ptr, control_ptr + 4),
        named("Tally")(piece_count, segment_count, reached_ptr, sums_ptr, groups, windows_ptr, GROUP, LANES),
        payload_ptr,
        control_ptr,
        named("Wire")(chunk_bytes, values_offset, counts_offset, indices_offset, VALUE, INDEX_BYTES, MAX_COUNT, WHOLE, BLOCK, CHUNKS),
        named("Format")(GRAD, PART, TILE, FEEDBACK),
        STAGES,
        STEP,
    )
