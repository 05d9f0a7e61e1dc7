"""`threshold_pack` on the device: the tables, the scratch memory and the launch of `pack_kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import launch, triton
from dct_compile.triton_kernels.gradient_tables import piece_table, tile_table
from dct_compile.triton_kernels.layout import TILE, GradientLayout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_stored
from dct_compile.triton_kernels.pack_kernel_triton import CONTROL_WORDS, STAGE_ALL, STAGE_NONE, pack_kernel
from dct_compile.triton_kernels.wire_triton import wire_arguments

PART = 1024
"""Elements of a tile that a program holds in registers at a time: 4 in each thread."""
WARPS = 8
GROUP = 16
"""Tiles that are counted, and whose entries are placed, together."""
STEP = 16
"""Staged entries of each tile of a group that a program moves at a time."""
LANES = 256
"""Groups, pieces or parameters that are settled at a time."""


@dataclass(frozen=True)
class Packer:
    """One call of `threshold_pack`: the tables, the scratch memory and the launch."""

    layout: GradientLayout
    state: tuple[Tensor, Tensor, Tensor]
    error_feedback: bool
    tiles: Tensor
    pieces: Tensor
    payload: Tensor
    staging: tuple[Tensor, Tensor, Tensor, Tensor]
    control: Tensor

    @classmethod
    def create(cls, layout: GradientLayout, state: tuple[Tensor, Tensor, Tensor], error_feedback: bool) -> Packer:
        """Allocates what a call needs. ``state``: residual, threshold, counters."""
        device = state[1].device
        tiles = tile_table(layout, device)
        count = tiles.shape[0]
        staging = (
            torch.empty(count, TILE, dtype=torch.float32, device=device),
            torch.empty(count, TILE, dtype=torch.int16, device=device),
            torch.empty(count, TILE // min(layout.block, TILE), dtype=torch.int32, device=device),
            torch.empty(2, count, dtype=torch.int32, device=device),
        )
        payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=device)
        control = torch.zeros(CONTROL_WORDS, dtype=torch.int32, device=device)
        return cls(layout, state, error_feedback, tiles, piece_table(layout, device), payload, staging, control)

    def stage_arguments(self, grad: Tensor, interval: int) -> tuple[Any, ...]:
        """Returns the first arguments of the kernels that stage tiles, in this order."""
        tables = (self.tiles, self.tiles.shape[0], self.pieces)
        return as_stored(grad), *self.state, interval, *tables, self.payload, *self.staging, self.control

    def stage_options(self, grad: Tensor) -> dict[str, Any]:
        """Returns the options that the kernels that stage tiles are compiled for."""
        options = {"GRAD": CODES[grad.dtype], "PART": PART, "TILE": TILE, "FEEDBACK": self.error_feedback, "num_warps": WARPS}
        return {**wire_arguments(self.layout), **options}

    def pack(self, grad: Tensor, stages: int, interval: int = 1, geometric: bool = False, hold: bool = False) -> Tensor:
        """Stages the tiles that are left to stage, and does all that follows. Returns the payload."""
        count, device = self.tiles.shape[0], self.payload.device
        groups = max(triton.cdiv(count, GROUP), 1)
        reached = torch.empty_like(self.staging[-1])
        sums = torch.empty(2, groups, dtype=torch.int64, device=device)
        windows = torch.empty(self.pieces.shape[0], 4, dtype=torch.int64, device=device)
        launch(pack_kernel, ((0 if stages == STAGE_NONE else count) + 2 * groups,))(
            *self.stage_arguments(grad, interval),
            *(self.pieces.shape[0], len(self.layout.segments), reached, sums, windows),
            STAGES=stages,
            GEOMETRIC=geometric,
            HOLD=hold,
            GROUP=GROUP,
            LANES=LANES,
            STEP=STEP,
            **self.stage_options(grad),
        )
        return self.payload


@torch.no_grad()
def threshold_pack_triton(
    grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> Tensor:
    """`threshold_pack_reference` in one launch and one pass over memory. No host sync; the same bytes in every run."""
    packer = Packer.create(layout, (residual, threshold, counters), error_feedback)
    return packer.pack(grad.contiguous(), STAGE_ALL) if layout.segments else packer.payload
