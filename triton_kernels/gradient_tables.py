"""What the Triton kernels of the gradient ops share: the bucket's blocks as device tensors, and the test for non-finite gradients."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from functools import lru_cache

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.layout import GradientLayout

BLOCK_COLUMNS = 4
PIECE_COLUMNS = 6


@lru_cache(maxsize=4096)
def block_table(layout: GradientLayout, device: torch.device) -> Tensor:
    """int64 [blocks of all pieces, BLOCK_COLUMNS]: grad offset, state offset, elements, piece. On the device once, not in every step."""
    rows = []
    for number, piece in enumerate(layout.pieces):
        starts = torch.arange(piece.blocks) * layout.block
        sizes = (piece.numel - starts).clamp(max=layout.block)
        rows.append(torch.stack([piece.grad_offset + starts, piece.state_offset + starts, sizes, torch.full_like(starts, number)], dim=1))
    return torch.cat(rows or [torch.empty(0, BLOCK_COLUMNS, dtype=torch.int64)]).to(device)


@lru_cache(maxsize=4096)
def piece_table(layout: GradientLayout, device: torch.device) -> Tensor:
    """int64 [pieces, PIECE_COLUMNS]: segment, chunk, capacity, first block in the chunk, first block in the block table, blocks."""
    rows = []
    first_block = 0
    for piece in layout.pieces:
        rows.append([piece.segment, piece.chunk, piece.capacity, piece.first_block, first_block, piece.blocks])
        first_block += piece.blocks
    return torch.tensor(rows, dtype=torch.int64).view(-1, PIECE_COLUMNS).to(device)


@jit
def is_nonfinite(x):  # type: ignore[no-untyped-def]
    """Whether float32 elements are NaN or infinite, by their exponents (a comparison could be folded away as always false)."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000


@jit
def nonfinite_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel]
    blocks_ptr,  # int64 [blocks, 4]
    wanted_ptr,  # int32 [1]: 0 where the answer is not needed
    found_ptr,  # int32 [1], zero before
    BLOCK: tl.constexpr,
):
    """found = 1 if an element of the block is not finite."""
    if tl.load(wanted_ptr) != 0:
        row = blocks_ptr + tl.program_id(0).to(tl.int64) * 4
        offsets = tl.arange(0, BLOCK)
        x = tl.load(grad_ptr + tl.load(row) + offsets, mask=offsets < tl.load(row + 2), other=0.0).to(tl.float32)
        if tl.max(is_nonfinite(x).to(tl.int32), axis=0) != 0:
            tl.atomic_max(found_ptr, 1)


def nonfinite_flag(grad: Tensor, layout: GradientLayout, wanted: Tensor) -> Tensor:
    """int32 [1]: 1 if a compressed element of ``grad`` is not finite; 0 without a look at them where ``wanted`` (int32 [1]) is 0."""
    found = torch.zeros_like(wanted)
    blocks = block_table(layout, grad.device)
    if blocks.shape[0]:
        nonfinite_kernel[(blocks.shape[0],)](grad, blocks, wanted, found, BLOCK=layout.block)
    return found
