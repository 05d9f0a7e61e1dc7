"""`threshold_pack` on the device: one launch, whose first tasks are one pass over memory and whose others touch only what is kept.

The tasks, in their order: each tile is staged (gradient and residual are read once, the residual is written once); each group of tiles is
counted, and the last group to be counted decides what each piece sends and where; each group's staged entries go to the payload, and
what found no room goes back to the residual. Nothing is read on the host, and integers alone decide the order: the bytes are the same in
every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl, triton
from dct_compile.triton_kernels.gradient_checks import check_state
from dct_compile.triton_kernels.gradient_tables import INDEX_TYPES, VALUE_TYPES, is_due, piece_table, tile_table
from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE, GradientLayout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_stored
from dct_compile.triton_kernels.pack_place_triton import place_group, settle, tally_group
from dct_compile.triton_kernels.pack_stage_triton import stage_tile, undo_tile
from dct_compile.triton_kernels.tasks_triton import finish_task, take_task, wait_for

PART = 1024
"""Elements of a tile that a program holds in registers at a time: 4 in each thread."""
WARPS = 8
GROUP = 16
"""Tiles that are counted, and whose entries are placed, together."""
STEP = 16
"""Staged entries of each tile of a group that a program moves at a time."""
LANES = 256
"""Groups, pieces or parameters that are settled at a time."""
CONTROL_WORDS = 5
"""int32, zero before: tasks taken, tiles staged, groups counted, whether all is settled, whether a W is not finite."""
STAGE_ALL, STAGE_DUE, STAGE_NONE = 0, 1, 2
"""Which tiles `pack_kernel` has to stage: all, those whose threshold is due, or none. `repack` has staged the others."""


@jit
def pack_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel], bfloat16 as int16; read again in held steps
    residual_ptr,  # float32 [state_numel]
    threshold_ptr,  # float32 [S]
    counters_ptr,  # int64 [S, 4]
    interval,  # of `select_threshold`
    tiles_ptr,  # int64 [tiles, 4]
    tiles,
    pieces_ptr,  # int64 [pieces, 7]
    payload_ptr,  # uint8 [payload_bytes], zero before
    staged_ptr,  # float32 [tiles, TILE]: scratch, as all that follows
    places_ptr,  # int16 [tiles, TILE]
    counts_ptr,  # int32 [tiles, TILE / BLOCK]
    found_ptr,  # int32 [2, tiles]
    control_ptr,  # int32 [CONTROL_WORDS], zero before
    pieces,
    segments,
    reached_ptr,  # int32 [2, tiles]
    sums_ptr,  # int64 [2, groups]
    windows_ptr,  # int64 [pieces, 4]
    STAGES: tl.constexpr,  # 0: all tiles, 1: those whose threshold is due, 2: none
    GEOMETRIC: tl.constexpr,
    chunk_bytes,
    values_offset,
    counts_offset,
    indices_offset,
    VALUE_TYPE: tl.constexpr,
    INDEX_TYPE: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    GRAD: tl.constexpr,
    VALUE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """A task, see the top of this file: stages a tile, counts a group of tiles (the last one settles), or places a group's entries."""
    task = take_task(control_ptr).to(tl.int64)
    groups = tl.maximum(tl.cdiv(tiles, GROUP), 1)
    if STAGES != 2:
        if task < tiles:
            wanted = True
            if STAGES == 1:
                segment = tl.load(pieces_ptr + tl.load(tiles_ptr + task * 4 + 3) * 7)
                wanted = is_due(counters_ptr + segment * 4, interval, GEOMETRIC)
            if wanted:
                stage_tile(
                    task,
                    grad_ptr,
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
            finish_task(control_ptr + 1)
        task -= tiles
    if task >= groups:
        wait_for(control_ptr + 3, 1)
        place_group(
            task - groups,
            residual_ptr,
            tiles_ptr,
            tiles,
            pieces_ptr,
            segments,
            payload_ptr,
            staged_ptr,
            places_ptr,
            counts_ptr,
            found_ptr,
            reached_ptr,
            sums_ptr,
            groups,
            windows_ptr,
            chunk_bytes,
            values_offset,
            counts_offset,
            indices_offset,
            VALUE_TYPE,
            INDEX_TYPE,
            VALUE,
            WHOLE,
            BLOCK,
            TILE,
            GROUP,
            STEP,
            FEEDBACK,
        )
    elif task >= 0:
        if STAGES != 2:
            wait_for(control_ptr + 1, tiles)
        held = tl.load(control_ptr + 4)
        if held != 0:
            for tile in range(task * GROUP, tl.minimum((task + 1) * GROUP, tiles)):
                undo_tile(
                    tile,
                    grad_ptr,
                    residual_ptr,
                    tiles_ptr,
                    tiles,
                    pieces_ptr,
                    payload_ptr,
                    staged_ptr,
                    places_ptr,
                    counts_ptr,
                    found_ptr,
                    chunk_bytes,
                    MAX_COUNT,
                    GRAD,
                    VALUE,
                    BLOCK,
                    PART,
                    TILE,
                    FEEDBACK,
                )
            tl.debug_barrier()
        tally_group(task, tiles, found_ptr, reached_ptr, sums_ptr, groups, GROUP)
        if finish_task(control_ptr + 2) == groups - 1:
            settle(
                counters_ptr,
                held,
                pieces_ptr,
                pieces,
                segments,
                tiles,
                reached_ptr,
                sums_ptr,
                groups,
                windows_ptr,
                GROUP=GROUP,
                LANES=LANES,
            )
            finish_task(control_ptr + 3)


@dataclass(frozen=True)
class Packer:
    """One call of `threshold_pack`: the tables, the scratch memory and the launch."""

    layout: GradientLayout
    residual: Tensor
    threshold: Tensor
    counters: Tensor
    error_feedback: bool
    tiles: Tensor
    pieces: Tensor
    payload: Tensor
    staged: Tensor
    places: Tensor
    counts: Tensor
    found: Tensor
    control: Tensor

    @classmethod
    def create(cls, layout: GradientLayout, residual: Tensor, threshold: Tensor, counters: Tensor, error_feedback: bool) -> Packer:
        device = threshold.device
        tiles = tile_table(layout, device)
        count = tiles.shape[0]
        return cls(
            layout,
            residual,
            threshold,
            counters,
            error_feedback,
            tiles,
            piece_table(layout, device),
            payload=torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=device),
            staged=torch.empty(count, TILE, dtype=torch.float32, device=device),
            places=torch.empty(count, TILE, dtype=torch.int16, device=device),
            counts=torch.empty(count, TILE // min(layout.block, TILE), dtype=torch.int32, device=device),
            found=torch.empty(2, count, dtype=torch.int32, device=device),
            control=torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device),
        )

    @property
    def stage_arguments(self) -> tuple[Any, ...]:
        """What the kernels that stage tiles take, in this order."""
        tables = (self.tiles, self.tiles.shape[0], self.pieces)
        return *tables, self.payload, self.staged, self.places, self.counts, self.found, self.control

    def stage_options(self, grad: Tensor) -> dict[str, Any]:
        """What the kernels that stage tiles are compiled for."""
        return {
            "chunk_bytes": self.layout.chunk_bytes,
            "MAX_COUNT": min(self.layout.max_count, TILE),
            "GRAD": CODES[grad.dtype],
            "VALUE": CODES[self.layout.value_dtype],
            "BLOCK": min(self.layout.block, TILE),
            "PART": PART,
            "TILE": TILE,
            "FEEDBACK": self.error_feedback,
            "num_warps": WARPS,
        }

    def pack(self, grad: Tensor, stages: int, interval: int = 1, geometric: bool = False) -> Tensor:
        """Stages the tiles that are left to stage, and all that follows. Returns the payload."""
        layout, count = self.layout, self.tiles.shape[0]
        groups = max(triton.cdiv(count, GROUP), 1)
        reached = torch.empty_like(self.found)
        sums = torch.empty(2, groups, dtype=torch.int64, device=self.payload.device)
        windows = torch.empty(self.pieces.shape[0], 4, dtype=torch.int64, device=self.payload.device)
        launch(pack_kernel, ((0 if stages == STAGE_NONE else count) + 2 * groups,))(
            *(as_stored(grad), self.residual, self.threshold, self.counters, interval),
            *self.stage_arguments,
            *(self.pieces.shape[0], len(layout.segments), reached, sums, windows),
            STAGES=stages,
            GEOMETRIC=geometric,
            values_offset=layout.values_offset,
            counts_offset=layout.counts_offset,
            indices_offset=layout.indices_offset,
            VALUE_TYPE=VALUE_TYPES[layout.value_dtype.itemsize],
            INDEX_TYPE=INDEX_TYPES[layout.index_bytes],
            WHOLE=layout.block == WHOLE_PIECE,
            GROUP=GROUP,
            STEP=STEP,
            LANES=LANES,
            **self.stage_options(grad),
        )
        return self.payload


@torch.no_grad()
def threshold_pack_triton(
    grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> Tensor:
    """`threshold_pack_reference` in one launch and one pass over memory. No host sync; the same bytes in every run."""
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    packer = Packer.create(layout, residual, threshold, counters, error_feedback)
    return packer.pack(grad.contiguous(), STAGE_ALL) if layout.segments else packer.payload
