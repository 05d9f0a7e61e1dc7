"""What follows the pass over memory of `threshold_pack`: who of the staged entries is sent, and where in the payload it stands."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_nonfinite
from dct_compile.triton_kernels.pack_stage_triton import encode, scale_place


@jit
def settle_kernel(  # type: ignore[no-untyped-def]
    counters_ptr,  # int64 [S, 4]
    held_ptr,  # int32 [1]
    pieces_ptr,  # int64 [CHUNKS * S, 7]
    reached_ptr,  # int64 [2, tiles]: running sums of `found`
    tiles,
    windows_ptr,  # int64 [CHUNKS * S, 2]: out, candidates of a piece and the first of them that is sent
    kept_ptr,  # int64 [CHUNKS * S]: out, how many of them are sent
    segments,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """What each piece sends, and the counters of each parameter."""
    segment = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = segment < segments
    step = tl.load(counters_ptr + segment * 4, mask=inside, other=0)
    kept_now = tl.zeros([LANES], dtype=tl.int64)
    overflow_now = tl.zeros([LANES], dtype=tl.int64)
    for chunk in range(0, CHUNKS):
        piece = chunk * segments + segment
        capacity = tl.load(pieces_ptr + piece * 7 + 2, mask=inside, other=0)
        first = tl.load(pieces_ptr + piece * 7 + 5, mask=inside, other=0)
        last = first + tl.load(pieces_ptr + piece * 7 + 6, mask=inside, other=0)
        entries = tl.load(reached_ptr + last - 1, mask=last > 0, other=0) - tl.load(reached_ptr + first - 1, mask=first > 0, other=0)
        cut = tl.load(reached_ptr + tiles + last - 1, mask=last > 0, other=0)
        cut -= tl.load(reached_ptr + tiles + first - 1, mask=first > 0, other=0)
        kept = tl.minimum(entries, capacity)
        tl.store(windows_ptr + piece * 2, entries, mask=inside)
        tl.store(windows_ptr + piece * 2 + 1, tl.where(entries > capacity, step * capacity % tl.maximum(entries, 1), 0), mask=inside)
        tl.store(kept_ptr + piece, kept, mask=inside)
        kept_now += kept
        overflow_now += entries + cut - kept
    live = inside & (tl.load(held_ptr) == 0)
    counters = counters_ptr + segment * 4
    tl.store(counters, step + 1, mask=live)
    tl.store(counters + 1, tl.load(counters + 1, mask=live, other=0) + kept_now, mask=live)
    tl.store(counters + 2, tl.load(counters + 2, mask=live, other=0) + overflow_now, mask=live)
    tl.store(counters + 3, overflow_now, mask=live)


@jit
def kept_before(rank, entries, start, kept):  # type: ignore[no-untyped-def]
    """How many of a piece's candidates before the one of this rank are sent: ``kept`` of ``entries`` are, cyclically from ``start``."""
    wrapped = tl.maximum(start + kept - entries, 0)
    return tl.minimum(rank, wrapped) + tl.minimum(tl.maximum(rank - start, 0), kept - wrapped)


@jit
def place_kernel(  # type: ignore[no-untyped-def]
    residual_ptr,  # float32 [state_numel]
    tiles_ptr,  # int64 [tiles, 4]
    pieces_ptr,  # int64 [pieces, 7]
    windows_ptr,  # int64 [pieces, 2]
    kept_ptr,  # int64 [pieces]
    slots_ptr,  # int64 [pieces]: running sum of `kept` in the chunk
    reached_ptr,  # int64 [2, tiles]
    staged_ptr,  # float32 [tiles, TILE]
    places_ptr,  # int16 [tiles, TILE]
    counts_ptr,  # int32 [tiles, TILE / BLOCK]
    found_ptr,  # int32 [2, tiles]
    payload_ptr,  # uint8 [payload_bytes]
    CHUNK_BYTES: tl.constexpr,
    VALUES_OFFSET: tl.constexpr,
    COUNTS_OFFSET: tl.constexpr,
    INDICES_OFFSET: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    INDEX_TYPE: tl.constexpr,
    VALUE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """The staged entries of a tile: those inside their piece's window go to the payload, the others back to the residual."""
    tile = tl.program_id(0).to(tl.int64)
    state = residual_ptr + tl.load(tiles_ptr + tile * 4 + 1)
    size = tl.load(tiles_ptr + tile * 4 + 2)
    piece = tl.load(tiles_ptr + tile * 4 + 3)
    first_block = tl.load(pieces_ptr + piece * 7 + 3)
    first_row = tl.load(pieces_ptr + piece * 7 + 5)
    entries = tl.load(windows_ptr + piece * 2)
    start = tl.load(windows_ptr + piece * 2 + 1)
    kept = tl.load(kept_ptr + piece)
    first_slot = tl.load(slots_ptr + piece) - kept
    count = tl.load(found_ptr + tile)
    base = tl.load(reached_ptr + tile) - count - tl.load(reached_ptr + first_row - 1, mask=first_row > 0, other=0)
    chunk = payload_ptr + tl.load(pieces_ptr + piece * 7 + 1) * CHUNK_BYTES
    values = (chunk + VALUES_OFFSET).to(tl.pointer_type(VALUE_TYPE))
    counts = (chunk + COUNTS_OFFSET).to(tl.pointer_type(INDEX_TYPE))
    indices = (chunk + INDICES_OFFSET).to(tl.pointer_type(INDEX_TYPE))
    if WHOLE:
        if tile == first_row:
            tl.store(counts + first_block, kept.to(INDEX_TYPE))
    else:
        blocks = tl.arange(0, TILE // BLOCK)
        in_block = tl.load(counts_ptr + tile * (TILE // BLOCK) + blocks, mask=blocks * BLOCK < size, other=0)
        end = base + tl.cumsum(in_block, axis=0)
        sent = kept_before(end, entries, start, kept) - kept_before(end - in_block, entries, start, kept)
        tl.store(counts + first_block + (tile - first_row) * (TILE // BLOCK) + blocks, sent.to(INDEX_TYPE), mask=blocks * BLOCK < size)
    scale = 0.0
    if VALUE == 3:
        scale = tl.load(scale_place(payload_ptr, pieces_ptr, piece, tile, CHUNK_BYTES))
    for first in range(0, count, STEP):
        entry = first + tl.arange(0, STEP)
        valid = entry < count
        w = tl.load(staged_ptr + tile * TILE + entry, mask=valid, other=0.0)
        place = tl.load(places_ptr + tile * TILE + entry, mask=valid, other=0).to(tl.int32)
        distance = base + entry - start
        inside = valid & (tl.where(distance < 0, distance + entries, distance) < kept)
        slot = first_slot + kept_before(base + entry, entries, start, kept)
        code, _ = encode(w, scale, VALUE)
        index = (tile - first_row) * TILE + place if WHOLE else place % BLOCK
        tl.store(values + slot, code.to(VALUE_TYPE), mask=inside)
        tl.store(indices + slot, index.to(INDEX_TYPE), mask=inside)
        if FEEDBACK:
            tl.store(state + place, w, mask=valid & (inside == 0) & (is_nonfinite(w) == 0))
