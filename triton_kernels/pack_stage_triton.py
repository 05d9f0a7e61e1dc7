"""The pass over memory of `threshold_pack`: each tile of 4096 elements compacts its candidates into a scratch region of its own.

All of them are staged, as if all could be sent, and their residual is what sending leaves. `undo_tile` takes that back where a sum
of the bucket was not finite.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_tables import is_nonfinite
from dct_compile.triton_kernels.number_formats_triton import as_float, float_of_bits, rounded_bits, rounded_product


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
def scale_place(payload_ptr, chunk, number, chunk_bytes):  # type: ignore[no-untyped-def]
    """Where in the payload the scale of a chunk's tile lies."""
    return payload_ptr.to(tl.pointer_type(tl.float32)) + chunk * (chunk_bytes // 4) + number


@jit
def store_scale(scale, tile, tiles_ptr, pieces_ptr, payload_ptr, chunk_bytes):  # type: ignore[no-untyped-def]
    """Writes the scale of a tile to the payload."""
    row = pieces_ptr + tl.load(tiles_ptr + tile * 4 + 3) * 7
    number = tl.load(row + 4) + tile - tl.load(row + 5)
    tl.store(scale_place(payload_ptr, tl.load(row + 1), number, chunk_bytes), scale)


@jit
def stage_part(w, candidate, offsets, entries, staged_ptr, places_ptr, counts_ptr, MAX_COUNT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Appends the candidates of a part of a tile, [n, m] with m <= BLOCK, behind the ``entries`` that are staged already, in order.

    At most MAX_COUNT of a block are staged (a limit that blocks of more than one part do not have). Returns which ones, and how many.
    """
    within = tl.cumsum(candidate, axis=1)
    listed = candidate * (within <= MAX_COUNT).to(tl.int32)
    counts = tl.sum(listed, axis=1)
    slot = entries + (tl.cumsum(counts, axis=0) - counts)[:, None] + within - 1
    tl.store(staged_ptr + slot, w, mask=listed != 0)
    tl.store(places_ptr + slot, offsets.to(tl.int16), mask=listed != 0)
    if candidate.shape[1] == BLOCK:
        tl.store(counts_ptr + tl.arange(0, candidate.shape[0]), counts)
    return listed != 0, tl.sum(counts, axis=0)


@jit
def stage_tile(  # type: ignore[no-untyped-def]
    tile,  # int64
    grad_ptr,  # [numel], bfloat16 as int16
    residual_ptr,  # float32 [state_numel]
    threshold_ptr,  # float32 [S]
    tiles_ptr,  # int64 [tiles, 4]
    tiles,
    pieces_ptr,  # int64 [pieces, 7]
    payload_ptr,  # uint8 [payload_bytes]: the scales are written
    staged_ptr,  # float32 [tiles, TILE]: out, W of the candidates of each tile
    places_ptr,  # int16 [tiles, TILE]: out, their places in the tile
    counts_ptr,  # int32 [tiles, TILE / BLOCK]: out, how many of each block are staged
    found_ptr,  # int32 [2, tiles]: out, candidates staged and not staged
    held_ptr,  # int32 [1]: set if a W is not finite
    chunk_bytes,
    MAX_COUNT: tl.constexpr,
    GRAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """W of a tile, part by part. Candidates are staged, and the new residual is what sending leaves of W."""
    grad = grad_ptr + tl.load(tiles_ptr + tile * 4)
    state = residual_ptr + tl.load(tiles_ptr + tile * 4 + 1)
    size = tl.load(tiles_ptr + tile * 4 + 2).to(tl.int32)
    piece = tl.load(tiles_ptr + tile * 4 + 3)
    tau = tl.load(threshold_ptr + tl.load(pieces_ptr + piece * 7))
    ROW: tl.constexpr = min(BLOCK, PART)
    lanes = tl.arange(0, PART // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    scale = 0.0
    if VALUE == 3:  # int8: the whole tile's largest candidate comes first; the second reading finds the tile in cache
        largest = tl.zeros([PART // ROW, ROW], dtype=tl.float32)
        for part in range(0, size, PART):
            inside = part + lanes < size
            w = as_float(tl.load(grad + part + lanes, mask=inside, other=0), GRAD)
            if FEEDBACK:
                w += tl.load(state + part + lanes, mask=inside, other=0.0)
            largest = tl.where(tl.abs(w) >= tau, tl.maximum(largest, tl.abs(w)), largest)
        scale = tl.max(tl.max(largest, axis=1), axis=0) * (1.0 / 127)  # threshold_pack.LARGEST_CODE
        store_scale(scale, tile, tiles_ptr, pieces_ptr, payload_ptr, chunk_bytes)
    entries = 0
    found = 0
    nonfinite = tl.zeros([PART // ROW, ROW], dtype=tl.int32)
    for part in range(0, size, PART):
        inside = part + lanes < size
        w = as_float(tl.load(grad + part + lanes, mask=inside, other=0), GRAD)
        if FEEDBACK:
            w += tl.load(state + part + lanes, mask=inside, other=0.0)
        nonfinite |= is_nonfinite(w).to(tl.int32)
        candidate = ((tl.abs(w) >= tau) & (w != 0.0) & inside).to(tl.int32)
        counts = counts_ptr + tile * (TILE // BLOCK) + part // BLOCK
        slots = tile * TILE
        staged, more = stage_part(w, candidate, part + lanes, entries, staged_ptr + slots, places_ptr + slots, counts, MAX_COUNT, BLOCK)
        entries += more
        found += tl.sum(tl.sum(candidate, axis=1), axis=0)
        if FEEDBACK:
            _, sent = encode(w, scale, VALUE)
            tl.store(state + part + lanes, tl.where(staged, w - sent, w), mask=inside & (is_nonfinite(w) == 0))
    if BLOCK > PART:
        tl.store(counts_ptr + tile, entries)
    tl.store(found_ptr + tile, entries)
    tl.store(found_ptr + tiles + tile, found - entries)
    if tl.max(tl.max(nonfinite, axis=1), axis=0) != 0:
        tl.atomic_max(held_ptr, 1)


@jit
def undo_tile(  # type: ignore[no-untyped-def]
    tile,  # int64
    grad_ptr,  # [numel], bfloat16 as int16
    residual_ptr,  # float32 [state_numel]
    tiles_ptr,  # int64 [tiles, 4]
    tiles,
    pieces_ptr,  # int64 [pieces, 7]
    payload_ptr,  # uint8 [payload_bytes]: the scales are written
    staged_ptr,  # float32 [tiles, TILE]
    places_ptr,  # int16 [tiles, TILE]
    counts_ptr,  # int32 [tiles, TILE / BLOCK]
    found_ptr,  # int32 [2, tiles]
    chunk_bytes,
    MAX_COUNT: tl.constexpr,
    GRAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """In a held step: takes the gradient out of the residual again and stages what is not finite instead."""
    grad = grad_ptr + tl.load(tiles_ptr + tile * 4)
    state = residual_ptr + tl.load(tiles_ptr + tile * 4 + 1)
    size = tl.load(tiles_ptr + tile * 4 + 2).to(tl.int32)
    slots = tile * TILE
    if FEEDBACK:
        count = tl.load(found_ptr + tile)
        for first in range(0, count, PART):
            entry = first + tl.arange(0, PART)
            w = tl.load(staged_ptr + slots + entry, mask=entry < count, other=0.0)
            place = tl.load(places_ptr + slots + entry, mask=entry < count, other=0).to(tl.int32)
            tl.store(state + place, w, mask=(entry < count) & (is_nonfinite(w) == 0))
        tl.debug_barrier()
    ROW: tl.constexpr = min(BLOCK, PART)
    lanes = tl.arange(0, PART // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    entries = 0
    found = 0
    for part in range(0, size, PART):
        inside = part + lanes < size
        g = as_float(tl.load(grad + part + lanes, mask=inside, other=0), GRAD)
        again = g
        if FEEDBACK:
            w = tl.load(state + part + lanes, mask=inside, other=0.0)
            again = g + w
            tl.store(state + part + lanes, w - g, mask=inside & (is_nonfinite(again) == 0))
        candidate = (inside & is_nonfinite(again)).to(tl.int32)
        counts = counts_ptr + tile * (TILE // BLOCK) + part // BLOCK
        _, more = stage_part(again, candidate, part + lanes, entries, staged_ptr + slots, places_ptr + slots, counts, MAX_COUNT, BLOCK)
        entries += more
        found += tl.sum(tl.sum(candidate, axis=1), axis=0)
    if BLOCK > PART:
        tl.store(counts_ptr + tile, entries)
    tl.store(found_ptr + tile, entries)
    tl.store(found_ptr + tiles + tile, found - entries)
    if VALUE == 3:  # int8
        scale = tl.where(found > 0, 0x7F800000, 0).to(tl.float32, bitcast=True)
        store_scale(scale, tile, tiles_ptr, pieces_ptr, payload_ptr, chunk_bytes)
