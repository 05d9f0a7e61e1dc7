"""What follows the pass over memory of `threshold_pack`: who of the staged entries is sent, and where in the payload it stands.

Tiles are counted in groups, so that neither a running sum over all tiles nor a single program per tile is needed.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_nonfinite
from dct_compile.triton_kernels.pack_stage_triton import encode, scale_place


@jit
def tally_group(group, tiles, found_ptr, reached_ptr, sums_ptr, groups, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Running sums of `found`, both of its kinds, within a group of tiles, and their totals."""
    tile = group * GROUP + tl.arange(0, GROUP)
    for kind in tl.static_range(0, 2):
        found = tl.load(found_ptr + kind * tiles + tile, mask=tile < tiles, other=0)
        tl.store(reached_ptr + kind * tiles + tile, tl.cumsum(found, axis=0), mask=tile < tiles)
        tl.store(sums_ptr + kind * groups + group, tl.sum(found, axis=0).to(tl.int64))


@jit
def found_before(tile, inside, kind, tiles, reached_ptr, sums_ptr, groups, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many candidates (``kind`` 0: staged, 1: not staged) lie in the tiles before ``tile``, once `settle` has summed the groups."""
    before = tl.load(sums_ptr + kind * groups + (tile - 1) // GROUP, mask=inside & (tile > 0), other=0)
    return before + tl.load(reached_ptr + kind * tiles + tile - 1, mask=inside & (tile > 0), other=0)


@jit
def settle(  # type: ignore[no-untyped-def]
    counters_ptr,  # int64 [S, 4]
    held,
    pieces_ptr,  # int64 [pieces, 7]
    pieces,
    segments,
    tiles,
    reached_ptr,  # int32 [2, tiles]: running sums within each group
    sums_ptr,  # int64 [2, groups]: in, totals of the groups; out, running sums without their own
    groups,
    windows_ptr,  # int64 [pieces, 4]: out, candidates, the first that is sent, how many are sent, entries of the pieces before
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """What each piece sends, and the counters of each parameter: the work of one program."""
    lanes = tl.arange(0, LANES)
    for kind in tl.static_range(0, 2):
        total = tl.zeros([], dtype=tl.int64)
        for first in range(0, groups, LANES):
            place = sums_ptr + kind * groups + first + lanes
            inside = first + lanes < groups
            found = tl.load(place, mask=inside, other=0)
            tl.store(place, total + tl.cumsum(found, axis=0) - found, mask=inside)
            total += tl.sum(found, axis=0)
    live = held == 0
    for first in range(0, segments, LANES):
        tl.store(counters_ptr + (first + lanes) * 4 + 3, 0, mask=(first + lanes < segments) & live)
    tl.debug_barrier()
    sent = tl.zeros([], dtype=tl.int64)
    for first in range(0, pieces, LANES):
        inside = first + lanes < pieces
        row = pieces_ptr + (first + lanes) * 7
        counters = counters_ptr + tl.load(row, mask=inside, other=0) * 4
        capacity = tl.load(row + 2, mask=inside, other=0)
        begin = tl.load(row + 5, mask=inside, other=0)
        end = begin + tl.load(row + 6, mask=inside, other=0)
        entries = found_before(end, inside, 0, tiles, reached_ptr, sums_ptr, groups, GROUP)
        entries -= found_before(begin, inside, 0, tiles, reached_ptr, sums_ptr, groups, GROUP)
        cut = found_before(end, inside, 1, tiles, reached_ptr, sums_ptr, groups, GROUP)
        cut -= found_before(begin, inside, 1, tiles, reached_ptr, sums_ptr, groups, GROUP)
        kept = tl.minimum(entries, capacity)
        step = tl.load(counters, mask=inside, other=0)
        window = windows_ptr + (first + lanes) * 4
        tl.store(window, entries, mask=inside)
        tl.store(window + 1, tl.where(entries > capacity, step * capacity % tl.maximum(entries, 1), 0), mask=inside)
        tl.store(window + 2, kept, mask=inside)
        tl.store(window + 3, sent + tl.cumsum(kept, axis=0) - kept, mask=inside)
        sent += tl.sum(kept, axis=0)
        tl.atomic_add(counters + 1, kept, mask=inside & live)
        tl.atomic_add(counters + 2, entries + cut - kept, mask=inside & live)
        tl.atomic_add(counters + 3, entries + cut - kept, mask=inside & live)
    tl.debug_barrier()
    for first in range(0, segments, LANES):
        inside = (first + lanes < segments) & live
        steps = counters_ptr + (first + lanes) * 4
        tl.store(steps, tl.load(steps, mask=inside, other=0) + 1, mask=inside)


@jit
def kept_before(rank, entries, start, kept):  # type: ignore[no-untyped-def]
    """How many of a piece's candidates before the one of this rank are sent: ``kept`` of ``entries`` are, cyclically from ``start``."""
    wrapped = tl.maximum(start + kept - entries, 0)
    return tl.minimum(rank, wrapped) + tl.minimum(tl.maximum(rank - start, 0), kept - wrapped)


@jit
def place_group(  # type: ignore[no-untyped-def]
    group,  # int64
    residual_ptr,  # float32 [state_numel]
    tiles_ptr,  # int64 [tiles, 4]
    tiles,
    pieces_ptr,  # int64 [pieces, 7]
    segments,
    payload_ptr,  # uint8 [payload_bytes]
    staged_ptr,  # float32 [tiles, TILE]
    places_ptr,  # int16 [tiles, TILE]
    counts_ptr,  # int32 [tiles, TILE / BLOCK]
    found_ptr,  # int32 [2, tiles]
    reached_ptr,  # int32 [2, tiles]
    sums_ptr,  # int64 [2, groups]
    groups,
    windows_ptr,  # int64 [pieces, 4]
    chunk_bytes,
    values_offset,
    counts_offset,
    indices_offset,
    VALUE_TYPE: tl.constexpr,
    INDEX_TYPE: tl.constexpr,
    VALUE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """The staged entries of a group of tiles: those inside their piece's window go to the payload, the others back to the residual."""
    tile = group * GROUP + tl.arange(0, GROUP)
    real = tile < tiles
    state = residual_ptr + tl.load(tiles_ptr + tile * 4 + 1, mask=real, other=0)
    size = tl.load(tiles_ptr + tile * 4 + 2, mask=real, other=0)
    piece = tl.load(tiles_ptr + tile * 4 + 3, mask=real, other=0)
    row = pieces_ptr + piece * 7
    chunk = tl.load(row + 1, mask=real, other=0)
    first_block = tl.load(row + 3, mask=real, other=0)
    first_row = tl.load(row + 5, mask=real, other=0)
    window = windows_ptr + piece * 4
    entries = tl.load(window, mask=real, other=0)
    start = tl.load(window + 1, mask=real, other=0)
    kept = tl.load(window + 2, mask=real, other=0)
    first_slot = tl.load(window + 3, mask=real, other=0) - tl.load(windows_ptr + chunk * segments * 4 + 3, mask=real, other=0)
    count = tl.load(found_ptr + tile, mask=real, other=0)
    base = found_before(tile, real, 0, tiles, reached_ptr, sums_ptr, groups, GROUP)
    base -= found_before(first_row, real, 0, tiles, reached_ptr, sums_ptr, groups, GROUP)
    start_of_chunk = payload_ptr + chunk * chunk_bytes
    counts = (start_of_chunk + counts_offset).to(tl.pointer_type(INDEX_TYPE)) + first_block
    if WHOLE:
        tl.store(counts, kept.to(INDEX_TYPE), mask=real & (tile == first_row))
    else:
        blocks = tl.arange(0, TILE // BLOCK)[None, :]
        covered = blocks * BLOCK < size[:, None]
        in_block = tl.load(counts_ptr + tile[:, None] * (TILE // BLOCK) + blocks, mask=covered, other=0)
        end = base[:, None] + tl.cumsum(in_block, axis=1)
        kept_now = kept_before(end, entries[:, None], start[:, None], kept[:, None])
        kept_now -= kept_before(end - in_block, entries[:, None], start[:, None], kept[:, None])
        tl.store(counts[:, None] + (tile - first_row)[:, None] * (TILE // BLOCK) + blocks, kept_now.to(INDEX_TYPE), mask=covered)
    scale = tl.zeros([GROUP], dtype=tl.float32)
    if VALUE == 3:
        number = tl.load(row + 4, mask=real, other=0) + tile - first_row
        scale = tl.load(scale_place(payload_ptr, chunk, number, chunk_bytes), mask=real, other=0.0)
    values = (start_of_chunk + values_offset).to(tl.pointer_type(VALUE_TYPE)) + first_slot
    indices = (start_of_chunk + indices_offset).to(tl.pointer_type(INDEX_TYPE)) + first_slot
    for first in range(0, tl.max(count, axis=0), STEP):
        entry = first + tl.arange(0, STEP)[None, :]
        staged = entry < count[:, None]
        w = tl.load(staged_ptr + tile[:, None] * TILE + entry, mask=staged, other=0.0)
        place = tl.load(places_ptr + tile[:, None] * TILE + entry, mask=staged, other=0).to(tl.int32)
        rank = base[:, None] + entry
        distance = rank - start[:, None]
        sent = staged & (tl.where(distance < 0, distance + entries[:, None], distance) < kept[:, None])
        slot = kept_before(rank, entries[:, None], start[:, None], kept[:, None])
        code, _ = encode(w, scale[:, None], VALUE)
        index = (tile - first_row)[:, None] * TILE + place if WHOLE else place % BLOCK
        tl.store(values[:, None] + slot, code.to(VALUE_TYPE), mask=sent)
        tl.store(indices[:, None] + slot, index.to(INDEX_TYPE), mask=sent)
        if FEEDBACK:
            tl.store(state[:, None] + place, w, mask=staged & (sent == 0) & (is_nonfinite(w) == 0))
