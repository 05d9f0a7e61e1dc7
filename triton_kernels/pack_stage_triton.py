"""The pass over memory of `threshold_pack`: each tile of 4096 elements compacts its candidates into a scratch region of its own.

All of them are staged, as if all could be sent, and their residual is what sending leaves. `undo_tile` takes that back where a sum
of the bucket was not finite.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_nonfinite
from dct_compile.triton_kernels.number_formats_triton import as_float, float_of_bits, rounded_bits, rounded_product
from dct_compile.triton_kernels.wire_triton import place_of, scale_pointer


@jit
def encode(w, scale, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 with the bits of the wire value of float32 ``w``, and what it stands for."""
    if VALUE == 3:  # int8
        finite = is_nonfinite(w) == 0
        units = tl.div_rn(tl.where(finite, w, 0.0), tl.where(scale > 0.0, scale, 1.0) + tl.zeros_like(w))
        rounded = (units + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23: the adder rounds to the nearest even integer
        rounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
        nan = (w.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000
        sign = tl.where(nan, 0, tl.where(w > 0.0, 1, -1))
        code = tl.where(is_nonfinite(scale), sign, tl.where(scale > 0.0, rounded, 0.0).to(tl.int32))
        return code, rounded_product(code.to(tl.float32), scale)
    bits = rounded_bits(w, VALUE, True)
    return bits, float_of_bits(bits, VALUE)


@jit
def store_scale(scale, tile, tables, payload, wire):  # type: ignore[no-untyped-def]
    """Writes the scale of a tile to the payload."""
    row = tables.pieces + tl.load(tables.tiles + tile * 4 + 3) * 7
    number = tl.load(row + 4) + tile - tl.load(row + 5)
    tl.store(scale_pointer(payload, tl.load(row + 1), number, wire), scale)


@jit
def stage_part(w, candidate, offsets, entries, values, indices, counts_ptr, wire):  # type: ignore[no-untyped-def]
    """Appends the candidates of a part of a tile, [n, m] with m <= BLOCK, behind the ``entries`` that are staged already, in order.

    At most MAX_COUNT of a block are staged (a limit that blocks of more than one part do not have). Returns which ones, and how many.
    """
    within = tl.cumsum(candidate, axis=1)
    listed = candidate * (within <= wire.MAX_COUNT).to(tl.int32)
    counts = tl.sum(listed, axis=1)
    slot = entries + (tl.cumsum(counts, axis=0) - counts)[:, None] + within - 1
    tl.store(values + slot, w, mask=listed != 0)
    tl.store(indices + slot, offsets.to(tl.int16), mask=listed != 0)
    if candidate.shape[1] == wire.BLOCK:
        tl.store(counts_ptr + tl.arange(0, candidate.shape[0]), counts)
    return listed != 0, tl.sum(counts, axis=0)


@jit
def stage_tile(tile, grad_ptr, state, tables, staging, payload, wire, form):  # type: ignore[no-untyped-def]
    """W of a tile, part by part. Candidates are staged, and the new residual is what sending leaves of W."""
    grad = grad_ptr + tl.load(tables.tiles + tile * 4)
    residual = state.residual + tl.load(tables.tiles + tile * 4 + 1)
    size = tl.load(tables.tiles + tile * 4 + 2).to(tl.int32)
    row = tables.pieces + tl.load(tables.tiles + tile * 4 + 3) * 7
    chunk = tl.load(row + 1)
    number = tile - tl.load(row + 5)
    tau = tl.load(state.threshold + tl.load(row))
    ROW: tl.constexpr = min(wire.BLOCK, form.PART)
    lanes = tl.arange(0, form.PART // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    scale = 0.0
    if wire.VALUE == 3:  # int8: the whole tile's largest candidate comes first; the second reading finds the tile in cache
        largest = tl.zeros([form.PART // ROW, ROW], dtype=tl.float32)
        for part in range(0, size, form.PART):
            inside = part + lanes < size
            place = place_of(part + lanes, number, chunk, wire)
            w = as_float(tl.load(grad + place, mask=inside, other=0), form.GRAD)
            if form.FEEDBACK:
                w += tl.load(residual + place, mask=inside, other=0.0)
            largest = tl.where(tl.abs(w) >= tau, tl.maximum(largest, tl.abs(w)), largest)
        scale = tl.max(tl.max(largest, axis=1), axis=0) * (1.0 / 127)  # threshold_pack.LARGEST_CODE
        store_scale(scale, tile, tables, payload, wire)
    entries = 0
    found = 0
    nonfinite = tl.zeros([form.PART // ROW, ROW], dtype=tl.int32)
    for part in range(0, size, form.PART):
        inside = part + lanes < size
        place = place_of(part + lanes, number, chunk, wire)
        w = as_float(tl.load(grad + place, mask=inside, other=0), form.GRAD)
        if form.FEEDBACK:
            w += tl.load(residual + place, mask=inside, other=0.0)
        nonfinite |= is_nonfinite(w).to(tl.int32)
        candidate = ((tl.abs(w) >= tau) & (w != 0.0) & inside).to(tl.int32)
        counts = staging.counts + tile * (form.TILE // wire.BLOCK) + part // wire.BLOCK
        values, indices = staging.staged + tile * form.TILE, staging.indices + tile * form.TILE
        staged, more = stage_part(w, candidate, part + lanes, entries, values, indices, counts, wire)
        entries += more
        found += tl.sum(tl.sum(candidate, axis=1), axis=0)
        if form.FEEDBACK:
            _, sent = encode(w, scale, wire.VALUE)
            tl.store(residual + place, tl.where(staged, w - sent, w), mask=inside & (is_nonfinite(w) == 0))
    if wire.BLOCK > form.PART:
        tl.store(staging.counts + tile, entries)
    tl.store(staging.found + tile, entries)
    tl.store(staging.found + tables.tile_count + tile, found - entries)
    if tl.max(tl.max(nonfinite, axis=1), axis=0) != 0:
        tl.atomic_max(staging.held, 1)


@jit
def undo_tile(tile, grad_ptr, state, tables, staging, payload, wire, form):  # type: ignore[no-untyped-def]
    """In a held step: takes the gradient out of the residual again and stages what is not finite instead."""
    grad = grad_ptr + tl.load(tables.tiles + tile * 4)
    residual = state.residual + tl.load(tables.tiles + tile * 4 + 1)
    size = tl.load(tables.tiles + tile * 4 + 2).to(tl.int32)
    row = tables.pieces + tl.load(tables.tiles + tile * 4 + 3) * 7
    chunk = tl.load(row + 1)
    number = tile - tl.load(row + 5)
    values, indices = staging.staged + tile * form.TILE, staging.indices + tile * form.TILE
    if form.FEEDBACK:
        count = tl.load(staging.found + tile)
        for first in range(0, count, form.PART):
            entry = first + tl.arange(0, form.PART)
            w = tl.load(values + entry, mask=entry < count, other=0.0)
            index = tl.load(indices + entry, mask=entry < count, other=0).to(tl.int32)
            tl.store(residual + place_of(index, number, chunk, wire), w, mask=(entry < count) & (is_nonfinite(w) == 0))
        tl.debug_barrier()
    ROW: tl.constexpr = min(wire.BLOCK, form.PART)
    lanes = tl.arange(0, form.PART // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    entries = 0
    found = 0
    for part in range(0, size, form.PART):
        inside = part + lanes < size
        place = place_of(part + lanes, number, chunk, wire)
        g = as_float(tl.load(grad + place, mask=inside, other=0), form.GRAD)
        again = g
        if form.FEEDBACK:
            w = tl.load(residual + place, mask=inside, other=0.0)
            again = g + w
            tl.store(residual + place, w - g, mask=inside & (is_nonfinite(again) == 0))
        candidate = (inside & is_nonfinite(again)).to(tl.int32)
        counts = staging.counts + tile * (form.TILE // wire.BLOCK) + part // wire.BLOCK
        _, more = stage_part(again, candidate, part + lanes, entries, values, indices, counts, wire)
        entries += more
        found += tl.sum(tl.sum(candidate, axis=1), axis=0)
    if wire.BLOCK > form.PART:
        tl.store(staging.counts + tile, entries)
    tl.store(staging.found + tile, entries)
    tl.store(staging.found + tables.tile_count + tile, found - entries)
    if wire.VALUE == 3:  # int8
        scale = tl.where(found > 0, 0x7F800000, 0).to(tl.float32, bitcast=True)
        store_scale(scale, tile, tables, payload, wire)
