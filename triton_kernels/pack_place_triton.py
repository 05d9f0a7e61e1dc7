"""The work that follows the pass over memory of `threshold_pack`: which staged entries are sent, and where in the payload they stand.

Tiles are counted in groups, so that neither a running sum over all tiles nor a single program per tile is needed.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_nonfinite
from dct_compile.triton_kernels.pack_stage_triton import encode
from dct_compile.triton_kernels.wire_triton import as_indices, as_values, place_of, scale_pointer


@jit
def tally_group(group, tiles, found_ptr, tally):  # type: ignore[no-untyped-def]
    """Computes running sums of `found`, both of its kinds, within a group of tiles, and their totals."""
    tile = group * tally.GROUP + tl.arange(0, tally.GROUP)
    for kind in tl.static_range(0, 2):
        found = tl.load(found_ptr + kind * tiles + tile, mask=tile < tiles, other=0)
        tl.store(tally.reached + kind * tiles + tile, tl.cumsum(found, axis=0), mask=tile < tiles)
        tl.store(tally.sums + kind * tally.groups + group, tl.sum(found, axis=0).to(tl.int64))


@jit
def found_before(tile, inside, kind, tiles, tally):  # type: ignore[no-untyped-def]
    """Returns the number of candidates (``kind`` 0: staged, 1: not staged) in the tiles before ``tile``.

    `settle` must have summed the groups.
    """
    before = tl.load(tally.sums + kind * tally.groups + (tile - 1) // tally.GROUP, mask=inside & (tile > 0), other=0)
    return before + tl.load(tally.reached + kind * tiles + tile - 1, mask=inside & (tile > 0), other=0)


@jit
def settle(counters_ptr, held, tables, tally):  # type: ignore[no-untyped-def]
    """Decides what each piece sends, and updates the counters of each parameter: the work of one program."""
    lanes = tl.arange(0, tally.LANES)
    for kind in tl.static_range(0, 2):
        total = tl.zeros([], dtype=tl.int64)
        for first in range(0, tally.groups, tally.LANES):
            sums = tally.sums + kind * tally.groups + first + lanes
            inside = first + lanes < tally.groups
            found = tl.load(sums, mask=inside, other=0)
            tl.store(sums, total + tl.cumsum(found, axis=0) - found, mask=inside)
            total += tl.sum(found, axis=0)
    # The counters of a held step stay. (Triton 3.9's interpreter takes no comparison of scalars as a part of a mask.)
    live_segments = tl.where(held == 0, tally.segment_count, 0)
    live_pieces = tl.where(held == 0, tally.piece_count, 0)
    for first in range(0, tally.segment_count, tally.LANES):
        last = counters_ptr + (first + lanes) * 5
        tl.store(last + 3, 0, mask=first + lanes < live_segments)
        tl.store(last + 4, 0, mask=first + lanes < tally.segment_count)
    tl.debug_barrier()
    sent = tl.zeros([], dtype=tl.int64)
    for first in range(0, tally.piece_count, tally.LANES):
        inside = first + lanes < tally.piece_count
        row = tables.pieces + (first + lanes) * 7
        counters = counters_ptr + tl.load(row, mask=inside, other=0) * 5
        capacity = tl.load(row + 2, mask=inside, other=0)
        begin = tl.load(row + 5, mask=inside, other=0)
        end = begin + tl.load(row + 6, mask=inside, other=0)
        entries = found_before(end, inside, 0, tables.tile_count, tally)
        entries -= found_before(begin, inside, 0, tables.tile_count, tally)
        cut = found_before(end, inside, 1, tables.tile_count, tally)
        cut -= found_before(begin, inside, 1, tables.tile_count, tally)
        kept = tl.minimum(entries, capacity)
        step = tl.load(counters, mask=inside, other=0)
        window = tally.windows + (first + lanes) * 4
        tl.store(window, entries, mask=inside)
        tl.store(window + 1, tl.where(entries > capacity, step * capacity % tl.maximum(entries, 1), 0), mask=inside)
        tl.store(window + 2, kept, mask=inside)
        tl.store(window + 3, sent + tl.cumsum(kept, axis=0) - kept, mask=inside)
        sent += tl.sum(kept, axis=0)
        live = first + lanes < live_pieces
        tl.atomic_add(counters + 1, kept, mask=live)
        tl.atomic_add(counters + 2, entries + cut - kept, mask=live)
        tl.atomic_add(counters + 3, entries + cut - kept, mask=live)
        tl.atomic_add(counters + 4, kept, mask=live)
    tl.debug_barrier()
    for first in range(0, tally.segment_count, tally.LANES):
        inside = first + lanes < live_segments
        steps = counters_ptr + (first + lanes) * 5
        tl.store(steps, tl.load(steps, mask=inside, other=0) + 1, mask=inside)


@jit
def kept_before(rank, entries, start, kept):  # type: ignore[no-untyped-def]
    """Returns the number of a piece's sent candidates before the one of this rank.

    ``kept`` of ``entries`` are sent, cyclically from ``start``.
    """
    wrapped = tl.maximum(start + kept - entries, 0)
    return tl.minimum(rank, wrapped) + tl.minimum(tl.maximum(rank - start, 0), kept - wrapped)


@jit
def place_group(group, residual_ptr, tables, staging, tally, payload, wire, form, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places the staged entries of a group of tiles.

    Those inside their piece's window go to the payload, the others back to the residual.
    """
    tile = group * tally.GROUP + tl.arange(0, tally.GROUP)
    real = tile < tables.tile_count
    residual = residual_ptr + tl.load(tables.tiles + tile * 4 + 1, mask=real, other=0)
    size = tl.load(tables.tiles + tile * 4 + 2, mask=real, other=0)
    piece = tl.load(tables.tiles + tile * 4 + 3, mask=real, other=0)
    row = tables.pieces + piece * 7
    chunk = tl.load(row + 1, mask=real, other=0)
    first_block = tl.load(row + 3, mask=real, other=0)
    first_row = tl.load(row + 5, mask=real, other=0)
    window = tally.windows + piece * 4
    entries = tl.load(window, mask=real, other=0)
    start = tl.load(window + 1, mask=real, other=0)
    kept = tl.load(window + 2, mask=real, other=0)
    first_slot = tl.load(window + 3, mask=real, other=0) - tl.load(tally.windows + chunk * tally.segment_count * 4 + 3, mask=real, other=0)
    count = tl.load(staging.found + tile, mask=real, other=0)
    base = found_before(tile, real, 0, tables.tile_count, tally)
    base -= found_before(first_row, real, 0, tables.tile_count, tally)
    start_of_chunk = payload + chunk * wire.chunk_bytes
    counts = as_indices(start_of_chunk + wire.counts_offset, wire.INDEX_BYTES) + first_block
    if wire.WHOLE:
        tl.store(counts, kept.to(counts.dtype.element_ty), mask=real & (tile == first_row))
    else:
        blocks = tl.arange(0, form.TILE // wire.BLOCK)[None, :]
        covered = blocks * wire.BLOCK < size[:, None]
        in_block = tl.load(staging.counts + tile[:, None] * (form.TILE // wire.BLOCK) + blocks, mask=covered, other=0)
        end = base[:, None] + tl.cumsum(in_block, axis=1)
        kept_now = kept_before(end, entries[:, None], start[:, None], kept[:, None])
        kept_now -= kept_before(end - in_block, entries[:, None], start[:, None], kept[:, None])
        counts_of_tile = counts[:, None] + (tile - first_row)[:, None] * (form.TILE // wire.BLOCK)
        tl.store(counts_of_tile + blocks, kept_now.to(counts.dtype.element_ty), mask=covered)
    scale = tl.zeros([tally.GROUP], dtype=tl.float32)
    if wire.VALUE == 3:
        number = tl.load(row + 4, mask=real, other=0) + tile - first_row
        scale = tl.load(scale_pointer(payload, chunk, number, wire), mask=real, other=0.0)
    values = as_values(start_of_chunk + wire.values_offset, wire.VALUE) + first_slot
    indices = as_indices(start_of_chunk + wire.indices_offset, wire.INDEX_BYTES) + first_slot
    for first in range(0, tl.max(count, axis=0), STEP):
        entry = first + tl.arange(0, STEP)[None, :]
        staged = entry < count[:, None]
        w = tl.load(staging.staged + tile[:, None] * form.TILE + entry, mask=staged, other=0.0)
        in_tile = tl.load(staging.indices + tile[:, None] * form.TILE + entry, mask=staged, other=0).to(tl.int32)
        rank = base[:, None] + entry
        distance = rank - start[:, None]
        sent = staged & (tl.where(distance < 0, distance + entries[:, None], distance) < kept[:, None])
        slot = kept_before(rank, entries[:, None], start[:, None], kept[:, None])
        code, _ = encode(w, scale[:, None], wire.VALUE)
        index = (tile - first_row)[:, None] * form.TILE + in_tile if wire.WHOLE else in_tile % wire.BLOCK
        tl.store(values[:, None] + slot, code.to(values.dtype.element_ty), mask=sent)
        tl.store(indices[:, None] + slot, index.to(indices.dtype.element_ty), mask=sent)
        if form.FEEDBACK:
            place = place_of(in_tile, (tile - first_row)[:, None], chunk[:, None], wire)
            tl.store(residual[:, None] + place, w, mask=staged & (sent == 0) & (is_nonfinite(w) == 0))
