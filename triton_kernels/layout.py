"""Where every byte of a payload lies: the wire format, shared by kernels, fakes, plan and report.

A *bucket* is a flat gradient buffer; its compressed parameters are *segments* ``(offset, numel)`` of it. Each segment is cut into
*blocks*; a kept entry is known by its index in its block, which needs one byte (block 256), two (block 4096) or four (a block that is
the whole piece). For the "owner" scheme every segment is split over ``chunks`` ranks; the part of one segment in one chunk is a *piece*.
Pieces are cut segment by segment, never across them, so what a parameter sends does not depend on its neighbours in the bucket. Which
elements of its segment a piece has: `shares.py`. Blocks and *tiles*, `TILE` elements that kernels work on, are counted along the piece.

One chunk of a payload (int8 values are multiples of a scale of their tile)::

    scales  [tiles_per_chunk]   float32                  only for int8 values: what a 1 stands for in each tile
    values  [capacity]          value dtype              kept entries, in order of piece, block, index
    counts  [blocks_per_chunk]  uint8 / uint16 / uint32  entries of each block; blocks past the last piece hold 0
    indices [capacity]          uint8 / uint16 / uint32  index of each entry in its block

Counts begin at a multiple of their size; the chunk is padded to 4 bytes.

A value whose fields mean nothing to the kernels cannot be made (`layout_checks.py`).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod

import torch

from dct_compile.triton_kernels.layout_checks import check_gradient_layout, check_row_layout, check_selection
from dct_compile.triton_kernels.shares import share_numel
from dct_compile.triton_kernels.values import PerSegment, Value, of_segment

SMALL_BLOCK = 256
LARGE_BLOCK = 4096
WHOLE_PIECE = 1 << 31
TILE = 4096
"""Elements that share a scale, and that one program of a kernel works on. A tile of a piece is `TILE` // `UNIT` units of its segment."""
COUNTERS = 5
"""Columns of a parameter's counters: step, entries kept and overflowed so far, overflowed and kept in the last step (0 if held)."""


def choose_block(density: float, largest_numel: int) -> int:
    """Returns the block with the fewest metadata bytes per element: counts are paid per block, indices per kept entry.

    ``largest_numel``: elements of the largest segment. One of more than `WHOLE_PIECE` elements is no single block.
    """
    metadata_bytes = {SMALL_BLOCK: 1 / SMALL_BLOCK + density, LARGE_BLOCK: 2 / LARGE_BLOCK + 2 * density}
    if largest_numel <= WHOLE_PIECE:
        metadata_bytes[WHOLE_PIECE] = 4 * density
    return min(metadata_bytes, key=lambda block: metadata_bytes[block])


@dataclass(frozen=True)
class Piece:
    """The part of one segment that lies in one chunk. Offsets and sizes in elements, blocks and tiles counted within the chunk.

    The offsets are those of the whole segment, in which `shares.place_of` finds the piece's elements. In the owner's buffer the piece lies
    in one run, from its own offsets on.
    """

    segment: int
    chunk: int
    grad_offset: int
    state_offset: int
    numel: int
    first_block: int
    blocks: int
    first_tile: int
    tiles: int
    capacity: int


@dataclass(frozen=True)
class GradientLayout(Value):
    """Geometry of a bucket's payload.

    ``chunk == -1``: the gradient is the whole bucket and the payload holds all chunks one after the other.
    ``chunk >= 0``: the gradient and the residual are the *owner's* buffer, the pieces of that chunk laid end to end, and the payload
    holds that one chunk.
    """

    segments: tuple[tuple[int, int], ...]
    block: int
    chunks: int
    chunk: int
    capacity_fraction: PerSegment
    value_dtype: torch.dtype

    def __post_init__(self) -> None:
        check_gradient_layout(self, LARGE_BLOCK, WHOLE_PIECE)

    @cached_property
    def _hash(self) -> int:
        return hash((self.segments, self.block, self.chunks, self.chunk, self.capacity_fraction, self.value_dtype))

    def __hash__(self) -> int:
        return self._hash  # a bucket may have hundreds of segments, and every step looks for its tables

    @property
    def index_bytes(self) -> int:
        return 1 if self.block <= SMALL_BLOCK else 2 if self.block <= LARGE_BLOCK else 4

    @property
    def max_count(self) -> int:
        """Entries that one block's count can express (255 for a block of 256)."""
        return min(self.block, (1 << 8 * self.index_bytes) - 1)

    @cached_property
    def all_pieces(self) -> tuple[Piece, ...]:
        """Every piece, ordered by chunk and then by segment; empty pieces included. Offsets are those of the whole bucket."""
        pieces: list[Piece] = []
        for chunk in range(self.chunks):
            first_block = first_tile = state_offset = 0
            for segment, (offset, numel) in enumerate(self.segments):
                size = share_numel(numel, self.chunks, chunk)
                blocks, tiles = ceil(size / self.block), ceil(size / TILE)
                capacity = min(size, ceil(size * of_segment(self.capacity_fraction, segment)))
                pieces.append(Piece(segment, chunk, offset, state_offset, size, first_block, blocks, first_tile, tiles, capacity))
                first_block += blocks
                first_tile += tiles
                state_offset += numel
        return tuple(pieces)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces that a kernel works on, in payload order; in the owner's buffer they lie end to end."""
        if self.chunk < 0:
            return self.all_pieces
        own: list[Piece] = []
        offset = 0
        for piece in self.all_pieces:
            if piece.chunk == self.chunk:
                own.append(replace(piece, chunk=0, grad_offset=offset, state_offset=offset))
                offset += piece.numel
        return tuple(own)

    @property
    def payload_chunks(self) -> int:
        return self.chunks if self.chunk < 0 else 1

    @cached_property
    def state_numel(self) -> int:
        """Elements of the residual (and of the owner's gradient buffer, for ``chunk >= 0``)."""
        return sum(piece.numel for piece in self.pieces)

    def _largest_chunk(self, field: str) -> int:
        totals = [0] * self.chunks
        for piece in self.all_pieces:
            totals[piece.chunk] += getattr(piece, field)
        return max(totals)

    @cached_property
    def blocks_per_chunk(self) -> int:
        return self._largest_chunk("blocks")

    @cached_property
    def tiles_per_chunk(self) -> int:
        return self._largest_chunk("tiles")

    @cached_property
    def capacity(self) -> int:
        """Entries that one chunk of the payload can hold."""
        return self._largest_chunk("capacity")

    @property
    def values_offset(self) -> int:
        """Byte offset of the values in a chunk, behind the scales where there are any."""
        return 4 * self.tiles_per_chunk if self.value_dtype == torch.int8 else 0

    @property
    def counts_offset(self) -> int:
        """Byte offset of the counts in a chunk."""
        end = self.values_offset + self.capacity * self.value_dtype.itemsize
        return ceil(end / self.index_bytes) * self.index_bytes

    @property
    def indices_offset(self) -> int:
        return self.counts_offset + self.blocks_per_chunk * self.index_bytes

    @cached_property
    def chunk_bytes(self) -> int:
        used = self.indices_offset + self.capacity * self.index_bytes
        return ceil(used / 4) * 4

    @property
    def payload_bytes(self) -> int:
        return self.payload_chunks * self.chunk_bytes


@dataclass(frozen=True)
class Selection(Value):
    """How and when a threshold is chosen.

    ``density``: the fraction of elements to keep (`PerSegment`). ``method``: "exact", "sampled", "laplace" or "fixed". ``fixed``: the
    threshold itself, for "fixed". ``refresh_interval``: steps between two choices at most. ``refresh_warmup``: "off" or "geometric".
    ``hold``: whether the threshold follows what the step before kept, between two choices. See `schedule` for all three.
    """

    density: PerSegment
    method: str
    fixed: float
    refresh_interval: int
    refresh_warmup: str
    hold: bool = False

    def __post_init__(self) -> None:
        check_selection(self)


@dataclass(frozen=True)
class RowLayout(Value):
    """Geometry of the payload of rows [R, *row_shape]: each row, the last dimension, becomes ``capacity`` values and their indices."""

    row_shape: tuple[int, ...]
    capacity: int
    value_dtype: torch.dtype

    def __post_init__(self) -> None:
        check_row_layout(self)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.row_shape[-1]

    @cached_property
    def inner(self) -> int:
        """Rows in one leading index."""
        return prod(self.row_shape[:-1])

    @property
    def index_bytes(self) -> int:
        return 1 if self.width <= 256 else 2

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row's payload."""
        return row_bytes(self.width, self.capacity, self.value_dtype)


def row_bytes(width: int, capacity: int, value_dtype: torch.dtype) -> int:
    """Returns bytes of one row's payload: ``capacity`` values, then ``capacity`` indices of 1 byte (width <= 256) or 2 bytes."""
    return capacity * (value_dtype.itemsize + (1 if width <= 256 else 2))


def quantized_row_bytes(width: int, bits: int) -> int:
    """Returns bytes of one quantised row: a bfloat16 scale, then ``width`` codes of 8 or 4 bits."""
    return 2 + (width * bits + 7) // 8
