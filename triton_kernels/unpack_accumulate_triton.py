"""`unpack_accumulate` on the device: one launch; each program owns a tile of the output and adds the payloads to it one after the other."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.gradient_checks import check_gathered
from dct_compile.triton_kernels.gradient_tables import INDEX_TYPES, VALUE_TYPES, device_table, piece_table, tile_table
from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE, GradientLayout
from dct_compile.triton_kernels.number_formats_triton import (
    CODES,
    as_bits,
    as_float,
    as_stored,
    float_of_bits,
    rounded_bits,
    rounded_product,
)
from dct_compile.triton_kernels.threshold_pack import INDEX_DTYPES
from dct_compile.triton_kernels.unpack_accumulate import uncovered_ranges

PART = 1024
"""Elements of a tile that a program clears or divides at a time."""
STEP = 128
"""Entries that it adds at a time."""


@jit
def lower_bound(sorted_ptr, low, high, wanted):  # type: ignore[no-untyped-def]
    """The first position in [low, high) whose element is not below ``wanted``, else ``high``."""
    while low < high:
        middle = (low + high) // 2
        below = tl.load(sorted_ptr + middle) < wanted
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@jit
def accumulate_tile(  # type: ignore[no-untyped-def]
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
    VALUE_TYPE: tl.constexpr,
    VALUE: tl.constexpr,
    INDEX_TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sum of all payloads' entries of this program's tile, in `total`.

    Within a payload an index occurs once; between payloads all lanes meet. What a damaged payload says beyond them is left out.
    """
    tile = tl.program_id(0).to(tl.int64)
    size = tl.load(tiles_ptr + tile * 4 + 2).to(tl.int32)
    total = total_ptr + tl.load(tiles_ptr + tile * 4)
    row = pieces_ptr + tl.load(tiles_ptr + tile * 4 + 3) * 7
    number = tile - tl.load(row + 5)
    chunk = tl.load(row + 1)
    chunk_block = tl.load(row + 3) + (0 if WHOLE else number * (TILE // BLOCK))
    lanes = tl.arange(0, PART)
    for part in range(0, size, PART):
        tl.store(total + part + lanes, tl.zeros([PART], dtype=tl.float32), mask=part + lanes < size)
    blocks = tl.arange(0, TILE // BLOCK)
    for round in range(0, rounds):
        payload = round * chunks + chunk
        start = gathered_ptr + payload * chunk_bytes
        indices = (start + indices_offset).to(tl.pointer_type(INDEX_TYPE))
        reached = reached_ptr + payload * blocks_per_chunk
        first = tl.load(reached + chunk_block - 1, mask=chunk_block > 0, other=0)
        if WHOLE:
            begin = tl.minimum(first, capacity)
            end = tl.minimum(tl.load(reached + chunk_block), capacity)
            first = lower_bound(indices, begin, end, number * TILE)
            last = lower_bound(indices, first, end, (number + 1) * TILE)
        else:
            ends = tl.load(reached + chunk_block + blocks, mask=blocks * BLOCK < size, other=0)
            last = tl.minimum(tl.max(ends, axis=0), capacity)
        first = tl.minimum(first, last)
        indices += first
        values = (start + values_offset).to(tl.pointer_type(VALUE_TYPE)) + first
        count = (last - first).to(tl.int32)
        tl.debug_barrier()
        for step in range(0, count, STEP):
            entry = step + tl.arange(0, STEP)
            valid = entry < count
            if WHOLE:
                place = (tl.load(indices + entry, mask=valid, other=0) - number * TILE).to(tl.int32)
            else:
                passed = ((ends - first).to(tl.int32)[None, :] <= entry[:, None]) & (blocks * BLOCK < size)[None, :]
                place = (tl.load(indices + entry, mask=valid, other=0).to(tl.int32) & (BLOCK - 1)) + tl.sum(
                    passed.to(tl.int32), axis=1
                ) * BLOCK
            valid = valid & (place >= 0) & (place < size)
            value = float_of_bits(tl.load(values + entry, mask=valid, other=0).to(tl.int32), VALUE)
            if VALUE == 3:  # int8
                value = rounded_product(value, tl.load(start.to(tl.pointer_type(tl.float32)) + tl.load(row + 4) + number))
            tl.store(total + place, tl.load(total + place, mask=valid, other=0.0) + value, mask=valid)
    tl.debug_barrier()


@jit
def unpack_kernel(  # type: ignore[no-untyped-def]
    gathered_ptr,  # uint8 [payloads, chunk_bytes]
    reached_ptr,  # int64 [payloads, blocks_per_chunk]: entries up to the end of each block
    tiles_ptr,  # int64 [tiles, 4]
    pieces_ptr,  # int64 [pieces, 7]
    total_ptr,  # float32 [numel]: the memory of `out` where that is float32
    out_ptr,  # int32 or int16 [numel]: the bits
    rounds,  # payloads per chunk
    divisor,
    chunk_bytes,
    chunks,
    values_offset,
    indices_offset,
    blocks_per_chunk,
    capacity,
    VALUE_TYPE: tl.constexpr,
    VALUE: tl.constexpr,
    INDEX_TYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
):
    """A tile of the output: the payloads' sum over the divisor. The sum is formed where the tile lies, in the first levels of cache."""
    tile = tl.program_id(0).to(tl.int64)
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
    start = tl.load(tiles_ptr + tile * 4)
    size = tl.load(tiles_ptr + tile * 4 + 2).to(tl.int32)
    lanes = tl.arange(0, PART)
    for part in range(0, size, PART):
        inside = part + lanes < size
        total = tl.load(total_ptr + start + part + lanes, mask=inside, other=0.0)
        mean = tl.div_rn(total, tl.full([PART], divisor, tl.float32))
        tl.store(out_ptr + start + part + lanes, rounded_bits(mean, OUT, False).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def fill_kernel(  # type: ignore[no-untyped-def]
    dense_ptr,  # the elements that no segment covers, end to end
    out_ptr,  # int32 or int16 [numel]: the bits
    gaps_ptr,  # int64 [tiles of the gaps, 3]: offset in `out`, offset in `dense`, elements
    OUT: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The elements of the output that no segment covers: copied, or 0."""
    row = gaps_ptr + tl.program_id(0).to(tl.int64) * 3
    offsets = tl.arange(0, TILE)
    inside = offsets < tl.load(row + 2)
    x = tl.zeros([TILE], dtype=tl.float32)
    if HAS_DENSE:
        x = as_float(tl.load(dense_ptr + tl.load(row + 1) + offsets, mask=inside, other=0), DENSE)
    tl.store(out_ptr + tl.load(row) + offsets, rounded_bits(x, OUT, False).to(out_ptr.dtype.element_ty), mask=inside)


@device_table
def _gap_table(layout: GradientLayout, numel: int, device: torch.device) -> Tensor:
    rows = []
    start = 0
    for offset, size in uncovered_ranges(layout, numel):
        rows += [[offset + first, start + first, min(TILE, size - first)] for first in range(0, size, TILE)]
        start += size
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)


def entries_reached(gathered: Tensor, layout: GradientLayout) -> Tensor:
    """int64 [payloads, layout.blocks_per_chunk]: the entries of each payload up to the end of each of its blocks."""
    rows = gathered.view(INDEX_DTYPES[layout.index_bytes]).view(-1, layout.chunk_bytes // layout.index_bytes)
    counts = rows.narrow(1, layout.counts_offset // layout.index_bytes, layout.blocks_per_chunk)
    if layout.index_bytes == 2:
        counts = counts.int() & 0xFFFF  # read as signed
    if layout.index_bytes == 4:
        counts = counts.clamp(min=0)  # above 2 ** 31 only in a damaged payload
    return counts.cumsum(1, dtype=torch.int64)


def payload_options(layout: GradientLayout) -> dict[str, object]:
    """The compile-time arguments of `accumulate_tile`."""
    return {
        "chunk_bytes": layout.chunk_bytes,
        "chunks": layout.payload_chunks,
        "values_offset": layout.values_offset,
        "indices_offset": layout.indices_offset,
        "blocks_per_chunk": layout.blocks_per_chunk,
        "capacity": layout.capacity,
        "VALUE_TYPE": VALUE_TYPES[layout.value_dtype.itemsize],
        "VALUE": CODES[layout.value_dtype],
        "INDEX_TYPE": INDEX_TYPES[layout.index_bytes],
        "WHOLE": layout.block == WHOLE_PIECE,
        "BLOCK": min(layout.block, TILE),
        "PART": PART,
        "TILE": TILE,
        "STEP": STEP,
        "num_warps": 4,
    }


@torch.no_grad()
def unpack_accumulate_triton(
    gathered: Tensor, dense: Tensor | None, numel: int, dtype: torch.dtype, layout: GradientLayout, divisor: int
) -> Tensor:
    """`unpack_accumulate_reference` with Triton. No host sync; the order of the additions is that of the payloads."""
    payloads = check_gathered(gathered, layout, dense, numel)
    device = gathered.device
    out = torch.empty(numel, dtype=dtype, device=device)
    tiles = tile_table(layout, device)
    if tiles.shape[0]:
        gathered = gathered.contiguous()
        total = out if dtype == torch.float32 else torch.empty(numel, dtype=torch.float32, device=device)
        tables = (entries_reached(gathered, layout), tiles, piece_table(layout, device))
        rounds = payloads // layout.payload_chunks
        means = (total, as_bits(out), rounds, float(divisor))
        launch(unpack_kernel, (tiles.shape[0],))(gathered, *tables, *means, OUT=CODES[dtype], **payload_options(layout))
    gaps = _gap_table(layout, numel, device)
    if gaps.shape[0]:
        source = out if dense is None else dense.contiguous()
        options = {"OUT": CODES[dtype], "DENSE": CODES[source.dtype], "HAS_DENSE": dense is not None}
        launch(fill_kernel, (gaps.shape[0],))(as_stored(source), as_bits(out), gaps, TILE=TILE, **options)
    return out
