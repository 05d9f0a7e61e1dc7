"""Where every byte of a payload lies: the wire format, shared by kernels, fakes, plan and report.

A *bucket* is a flat gradient buffer; its compressed parameters are *segments* ``(offset, numel)`` of it. Each segment is cut into
*blocks*; a kept entry is known by its place in its block, which needs one byte (block 256) or two (block 4096). For the "owner" scheme
the blocks of every segment are split over ``chunks`` ranks; the part of one segment in one chunk is a *piece*. Pieces are cut segment by
segment, never across them, so what a parameter sends does not depend on its neighbours in the bucket.

One chunk of a payload::

    values  [capacity]          value dtype     kept entries, in order of piece, block, index
    counts  [blocks_per_chunk]  uint8 / uint16  entries of each block; blocks past the last piece hold 0
    indices [capacity]          uint8 / uint16  place of each entry in its block
    padding to 4 bytes
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import torch

SMALL_BLOCK = 256
LARGE_BLOCK = 4096
COUNTERS = 4
"""Columns of a parameter's counters: step, entries kept so far, entries overflowed so far, entries overflowed in the last step."""


def choose_block(density: float) -> int:
    """The block with the fewer metadata bytes per element: counts are paid per block, indices per kept entry."""
    small = 1 / SMALL_BLOCK + density
    large = 2 / LARGE_BLOCK + 2 * density
    return SMALL_BLOCK if small <= large else LARGE_BLOCK


def piece_share(numel: int, block: int, chunks: int) -> int:
    """Elements of one segment that each chunk gets (the last ones may get fewer): whole blocks, evenly split."""
    return ceil(ceil(numel / block) / chunks) * block


@dataclass(frozen=True)
class Piece:
    """The part of one segment that lies in one chunk. Offsets and sizes in elements, blocks counted within the chunk."""

    segment: int
    chunk: int
    grad_offset: int
    state_offset: int
    numel: int
    first_block: int
    blocks: int
    capacity: int


@dataclass(frozen=True)
class GradientLayout:
    """Geometry of a bucket's payload.

    ``chunk == -1``: the gradient is the whole bucket and the payload holds all chunks one after the other.
    ``chunk >= 0``: the gradient and the residual are the *owner's* buffer, the pieces of that chunk laid end to end, and the payload
    holds that one chunk.
    """

    segments: tuple[tuple[int, int], ...]
    block: int
    chunks: int
    chunk: int
    capacity_fraction: float
    value_dtype: torch.dtype

    @property
    def index_bytes(self) -> int:
        return 1 if self.block <= SMALL_BLOCK else 2

    @property
    def max_count(self) -> int:
        """Entries that one block's count can express (255 for a block of 256)."""
        return min(self.block, (1 << 8 * self.index_bytes) - 1)

    @cached_property
    def all_pieces(self) -> tuple[Piece, ...]:
        """Every piece, ordered by chunk and then by segment; empty pieces included. Offsets are those of the whole bucket."""
        pieces: list[Piece] = []
        for chunk in range(self.chunks):
            first_block = state_offset = 0
            for index, (offset, numel) in enumerate(self.segments):
                share = piece_share(numel, self.block, self.chunks)
                start = min(chunk * share, numel)
                size = min((chunk + 1) * share, numel) - start
                blocks = ceil(size / self.block)
                capacity = min(size, ceil(size * self.capacity_fraction))
                pieces.append(Piece(index, chunk, offset + start, state_offset + start, size, first_block, blocks, capacity))
                first_block += blocks
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
                own.append(Piece(piece.segment, 0, offset, offset, piece.numel, piece.first_block, piece.blocks, piece.capacity))
                offset += piece.numel
        return tuple(own)

    @property
    def payload_chunks(self) -> int:
        return self.chunks if self.chunk < 0 else 1

    @property
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
    def capacity(self) -> int:
        """Entries that one chunk of the payload can hold."""
        return self._largest_chunk("capacity")

    @property
    def counts_offset(self) -> int:
        """Byte offset of the counts in a chunk (even, because the count may be 16-bit: values are 2 or 4 bytes)."""
        return self.capacity * self.value_dtype.itemsize

    @property
    def indices_offset(self) -> int:
        return self.counts_offset + self.blocks_per_chunk * self.index_bytes

    @property
    def chunk_bytes(self) -> int:
        used = self.indices_offset + self.capacity * self.index_bytes
        return (used + 3) // 4 * 4

    @property
    def payload_bytes(self) -> int:
        return self.payload_chunks * self.chunk_bytes


@lru_cache(maxsize=4096)
def gradient_layout(
    segments: tuple[int, ...], block: int, chunks: int, chunk: int, capacity_fraction: float, value_dtype: torch.dtype
) -> GradientLayout:
    """The layout for an op's arguments; ``segments`` is flat: offset, numel, offset, numel, ..."""
    pairs = tuple(zip(segments[::2], segments[1::2], strict=True))
    return GradientLayout(pairs, block, chunks, chunk, capacity_fraction, value_dtype)


def row_bytes(width: int, slots: int, value_dtype: torch.dtype) -> int:
    """Bytes of one row's payload: ``slots`` values, then ``slots`` indices of 1 byte (width <= 256) or 2 bytes."""
    return slots * (value_dtype.itemsize + (1 if width <= 256 else 2))


def quantized_row_bytes(width: int, bits: int) -> int:
    """Bytes of one quantised row: a bfloat16 scale, then ``width`` codes of 8 or 4 bits."""
    return 2 + (width * bits + 7) // 8
