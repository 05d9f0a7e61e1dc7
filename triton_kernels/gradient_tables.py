"""Shared by the Triton kernels of the gradient ops: a bucket's tiles and pieces as device tensors, and tests on the device."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.layout import TILE, GradientLayout

TILE_COLUMNS = 4
PIECE_COLUMNS = 7
_T = TypeVar("_T")


def device_table(make: Callable[..., _T]) -> Callable[..., _T]:
    """Caches what ``make`` returns: real tensors in memory of their own, also while a graph is traced or warmed up for capture.

    Fake tensors and the memory pool of a CUDA graph are matters of the calling thread, so the tables are made on another one.
    """

    @lru_cache(maxsize=4096)
    @wraps(make)
    def table(*args: Any) -> _T:
        return _on_another_thread(make, *args)

    return table


def _on_another_thread(make: Callable[..., _T], *args: Any) -> _T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make, *args).result()


@device_table
def tile_table(layout: GradientLayout, device: torch.device) -> Tensor:
    """int64 [tiles of all pieces, TILE_COLUMNS]: grad offset, state offset, elements, piece. On the device once, not in every step.

    The offsets are those of the first of the rounds in which the tile's units lie, see `shares.py`.
    """
    rows = []
    for number, piece in enumerate(layout.pieces):
        starts = torch.arange(piece.tiles) * TILE
        sizes = (piece.numel - starts).clamp(max=TILE)
        rounds = starts * layout.payload_chunks
        rows.append(torch.stack([piece.grad_offset + rounds, piece.state_offset + rounds, sizes, torch.full_like(starts, number)], dim=1))
    return torch.cat(rows or [torch.empty(0, TILE_COLUMNS, dtype=torch.int64)]).to(device)


@device_table
def piece_table(layout: GradientLayout, device: torch.device) -> Tensor:
    """int64 [pieces, PIECE_COLUMNS]: segment, chunk, capacity, first block and first tile in the chunk, first tile of all, tiles."""
    rows = []
    first_row = 0
    for piece in layout.pieces:
        rows.append([piece.segment, piece.chunk, piece.capacity, piece.first_block, piece.first_tile, first_row, piece.tiles])
        first_row += piece.tiles
    return torch.tensor(rows, dtype=torch.int64).view(-1, PIECE_COLUMNS).to(device)


@jit
def is_nonfinite(x):  # type: ignore[no-untyped-def]
    """Returns True if float32 elements are NaN or infinite, by their exponents (a comparison could be folded away as always false)."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000


@jit
def is_due(counters, interval, GEOMETRIC: tl.constexpr, HOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    """`schedule.is_refresh_step` of the parameter whose counters (a pointer to int64 [5]) are given."""
    step = tl.load(counters)
    gap = step * 0 + interval
    due = step < 0
    if GEOMETRIC:
        power = step  # the largest power of two that is not above the step: fill the bits below its highest one
        for shift in tl.static_range(0, 6):
            power = power | (power >> (1 << shift))
        gap = tl.minimum(gap, tl.maximum((power - (power >> 1)) // 8, 1))
        excess = tl.load(counters + 3)
        if HOLD:
            excess -= tl.load(counters + 4)
        due = excess > 0
    return due | (step % gap == 0)
