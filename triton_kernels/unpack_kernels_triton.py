"""The kernels of `unpack_accumulate`: each program owns a tile of the output and adds the payloads to it one after the other."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.number_formats_triton import as_float, float_of_bits, rounded_bits, rounded_product
from dct_compile.triton_kernels.tuples_triton import named
from dct_compile.triton_kernels.wire_triton import as_indices, as_values, place_of


@jit
def lower_bound(sorted_ptr, low, high, wanted):  # type: ignore[no-untyped-def]
    """Returns the first position in [low, high) whose element is not below ``wanted``, else ``high``."""
    while low < high:
        middle = (low + high) // 2
        below = tl.load(sorted_ptr + middle) < wanted
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@jit
def accumulate_tile(gathered, tables, total_ptr, wire, PART: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Forms the sum of all payloads' entries of this program's tile, in `total`.

    Within a payload an index occurs once; between payloads all lanes meet. Entries of a damaged payload outside of the tile are left out.
    """
    tile = tl.program_id(0).to(tl.int64)
    size = tl.load(tables.tiles + tile * 4 + 2).to(tl.int32)
    total = total_ptr + tl.load(tables.tiles + tile * 4)
    row = tables.pieces + tl.load(tables.tiles + tile * 4 + 3) * 7
    number = tile - tl.load(row + 5)
    chunk = tl.load(row + 1)
    chunk_block = tl.load(row + 3) + (0 if wire.WHOLE else number * (TILE // wire.BLOCK))
    lanes = tl.arange(0, PART)
    for part in range(0, size, PART):
        place = place_of(part + lanes, number, chunk, wire)
        tl.store(total + place, tl.zeros([PART], dtype=tl.float32), mask=part + lanes < size)
    blocks = tl.arange(0, TILE // wire.BLOCK)
    for round in range(0, gathered.rounds):
        payload = round * gathered.chunks + chunk
        start = gathered.payloads + payload * wire.chunk_bytes
        indices = as_indices(start + wire.indices_offset, wire.INDEX_BYTES)
        reached = gathered.reached + payload * gathered.blocks_per_chunk
        first = tl.load(reached + chunk_block - 1, mask=chunk_block > 0, other=0)
        if wire.WHOLE:
            begin = tl.minimum(first, gathered.capacity)
            end = tl.minimum(tl.load(reached + chunk_block), gathered.capacity)
            first = lower_bound(indices, begin, end, number * TILE)
            last = lower_bound(indices, first, end, (number + 1) * TILE)
        else:
            ends = tl.load(reached + chunk_block + blocks, mask=blocks * wire.BLOCK < size, other=0)
            last = tl.minimum(tl.max(ends, axis=0), gathered.capacity)
        first = tl.minimum(first, last)
        indices += first
        values = as_values(start + wire.values_offset, wire.VALUE) + first
        count = (last - first).to(tl.int32)
        tl.debug_barrier()
        for step in range(0, count, STEP):
            entry = step + tl.arange(0, STEP)
            valid = entry < count
            if wire.WHOLE:
                in_tile = (tl.load(indices + entry, mask=valid, other=0) - number * TILE).to(tl.int32)
            else:
                passed = ((ends - first).to(tl.int32)[None, :] <= entry[:, None]) & (blocks * wire.BLOCK < size)[None, :]
                in_block = tl.load(indices + entry, mask=valid, other=0).to(tl.int32) & (wire.BLOCK - 1)
                in_tile = in_block + tl.sum(passed.to(tl.int32), axis=1) * wire.BLOCK
            valid = valid & (in_tile >= 0) & (in_tile < size)
            value = float_of_bits(tl.load(values + entry, mask=valid, other=0).to(tl.int32), wire.VALUE)
            if wire.VALUE == 3:  # int8
                value = rounded_product(value, tl.load(start.to(tl.pointer_type(tl.float32)) + tl.load(row + 4) + number))
            place = place_of(in_tile, number, chunk, wire)
            tl.store(total + place, tl.load(total + place, mask=valid, other=0.0) + value, mask=valid)
    tl.debug_barrier()


@jit
def unpack_tile(gathered, tables, total_ptr, out_ptr, divisor, wire, form, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes a tile of the output: the payloads' sum over the divisor.

    The sum is formed where the tile lies, in the first levels of cache.
    """
    tile = tl.program_id(0).to(tl.int64)
    accumulate_tile(gathered, tables, total_ptr, wire, form.PART, form.TILE, STEP)
    start = tl.load(tables.tiles + tile * 4)
    size = tl.load(tables.tiles + tile * 4 + 2).to(tl.int32)
    row = tables.pieces + tl.load(tables.tiles + tile * 4 + 3) * 7
    chunk = tl.load(row + 1)
    number = tile - tl.load(row + 5)
    lanes = tl.arange(0, form.PART)
    for part in range(0, size, form.PART):
        inside = part + lanes < size
        place = start + place_of(part + lanes, number, chunk, wire)
        total = tl.load(total_ptr + place, mask=inside, other=0.0)
        mean = tl.div_rn(total, tl.full([form.PART], divisor, tl.float32))
        tl.store(out_ptr + place, rounded_bits(mean, form.OUT, False).to(out_ptr.dtype.element_ty), mask=inside)


@jit
def unpack_kernel(  # type: ignore[no-untyped-def]
    payloads_ptr,  # from here on the fields of `Gathered` and `Tables`
    reached_ptr,
    rounds,
    chunks,
    blocks_per_chunk,
    capacity,
    tiles_ptr,
    tile_count,
    pieces_ptr,
    total_ptr,  # float32 [numel]: the memory of `out` where that is float32
    out_ptr,  # int32 or int16 [numel]: the bits
    divisor,
    chunk_bytes,  # from here on the fields of `Wire`
    values_offset,
    counts_offset,
    indices_offset,
    VALUE: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
):
    """Executes `unpack_tile` with tuples made of its arguments."""
    unpack_tile(
        named("Gathered")(payloads_ptr, reached_ptr, rounds, chunks, blocks_per_chunk, capacity),
        named("Tables")(tiles_ptr, tile_count, pieces_ptr),
        total_ptr,
        out_ptr,
        divisor,
        named("Wire")(chunk_bytes, values_offset, counts_offset, indices_offset, VALUE, INDEX_BYTES, MAX_COUNT, WHOLE, BLOCK, CHUNKS),
        named("OutputFormat")(OUT, PART, TILE),
        STEP,
    )


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
    """Writes the elements of the output that no segment covers: copied, or 0."""
    row = gaps_ptr + tl.program_id(0).to(tl.int64) * 3
    offsets = tl.arange(0, TILE)
    inside = offsets < tl.load(row + 2)
    x = tl.zeros([TILE], dtype=tl.float32)
    if HAS_DENSE:
        x = as_float(tl.load(dense_ptr + tl.load(row + 1) + offsets, mask=inside, other=0), DENSE)
    tl.store(out_ptr + tl.load(row) + offsets, rounded_bits(x, OUT, False).to(out_ptr.dtype.element_ty), mask=inside)
