"""`threshold_pack` on the device: one pass over the gradient and the residual, and small launches that touch only what is kept.

`stage_kernel` reads gradient and residual once, writes the residual once, and stages the candidates of each tile. Then the number of
candidates decides, on the device, what each piece sends and where, and `place_kernel` copies the staged entries to the payload and gives
back to the residual what found no room. Nothing spins, nothing is read on the host, and integers alone decide the order: the bytes are the
same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import tl, triton
from dct_compile.triton_kernels.gradient_checks import check_state
from dct_compile.triton_kernels.gradient_tables import INDEX_TYPES, piece_table, tile_table
from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE, GradientLayout, gradient_layout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_stored
from dct_compile.triton_kernels.pack_place_triton import place_kernel, settle_kernel
from dct_compile.triton_kernels.pack_stage_triton import stage_kernel, undo_kernel

PART = 1024
"""Elements of a tile that a program holds in registers at a time: 4 in each thread."""
WARPS = 8
STEP = 256
"""Staged entries that a program moves at a time."""
SEGMENT_LANES = 128


@dataclass(frozen=True)
class Packer:
    """One call of `threshold_pack`: the tables, the scratch memory and the launches, in their order."""

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
    held: Tensor

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
            held=torch.zeros(1, dtype=torch.int32, device=device),
        )

    @property
    def scratch(self) -> tuple[Tensor, ...]:
        return self.staged, self.places, self.counts, self.found

    @property
    def options(self) -> dict[str, Any]:
        """What all kernels that see a tile are compiled for."""
        return {
            "CHUNK_BYTES": self.layout.chunk_bytes,
            "VALUE": CODES[self.layout.value_dtype],
            "BLOCK": min(self.layout.block, TILE),
            "TILE": TILE,
            "FEEDBACK": self.error_feedback,
            "enable_fp_fusion": False,  # w - code * scale is rounded twice in every implementation
            "num_warps": WARPS,
        }

    @property
    def stage_arguments(self) -> tuple[Any, ...]:
        """What stages entries takes, in this order: tables, payload, scratch, flag."""
        return self.tiles, self.tiles.shape[0], self.pieces, self.payload, *self.scratch, self.held

    def stage_options(self, grad: Tensor) -> dict[str, Any]:
        """What the kernels that stage entries are compiled for."""
        source = {"GRAD": CODES[grad.dtype], "PART": PART}
        return {**self.options, **source, "MAX_COUNT": min(self.layout.max_count, TILE)}

    def stage(self, grad: Tensor) -> None:
        """The pass over ``grad`` and the residual."""
        state = (self.residual, self.threshold)
        stage_kernel[(self.tiles.shape[0],)](as_stored(grad), *state, *self.stage_arguments, **self.stage_options(grad))

    def finish(self, grad: Tensor) -> Tensor:
        """Everything behind the pass; ``grad`` is read in held steps alone. Returns the payload."""
        layout, count = self.layout, self.tiles.shape[0]
        parameters = len(layout.segments)
        if count:
            undo_kernel[(count,)](as_stored(grad), self.residual, *self.stage_arguments, **self.stage_options(grad))
        reached = self.found.cumsum(1)
        windows = torch.empty(self.pieces.shape[0], 2, dtype=torch.int64, device=self.payload.device)
        kept = torch.empty(layout.payload_chunks, parameters, dtype=torch.int64, device=self.payload.device)
        grid = (triton.cdiv(parameters, SEGMENT_LANES),)
        settled = (reached, count, windows, kept, parameters)
        settle_kernel[grid](self.counters, self.held, self.pieces, *settled, CHUNKS=layout.payload_chunks, LANES=SEGMENT_LANES)
        if count:
            place_kernel[(count,)](
                *(self.residual, self.tiles, self.pieces, windows, kept, kept.cumsum(1), reached),
                *(*self.scratch, self.payload),
                VALUES_OFFSET=layout.values_offset,
                COUNTS_OFFSET=layout.counts_offset,
                INDICES_OFFSET=layout.indices_offset,
                VALUE_TYPE={1: tl.int8, 2: tl.int16, 4: tl.int32}[layout.value_dtype.itemsize],
                INDEX_TYPE=INDEX_TYPES[layout.index_bytes],
                WHOLE=layout.block == WHOLE_PIECE,
                STEP=STEP,
                **self.options,
            )
        return self.payload


@torch.no_grad()
def threshold_pack_triton(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    error_feedback: bool,
) -> Tensor:
    """`threshold_pack_reference` in one pass over memory. No host sync; the same bytes in every run."""
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    packer = Packer.create(layout, residual, threshold, counters, error_feedback)
    if layout.segments:
        grad = grad.contiguous()
        if packer.tiles.shape[0]:
            packer.stage(grad)
        packer.finish(grad)
    return packer.payload
