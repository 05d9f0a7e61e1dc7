"""The format of payloads in the Triton kernels of the gradient ops."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE, GradientLayout
from dct_compile.triton_kernels.number_formats_triton import CODES


def wire_arguments(layout: GradientLayout) -> dict[str, object]:
    """Returns the fields of `Wire`, as arguments of a kernel."""
    return {
        "chunk_bytes": layout.chunk_bytes,
        "values_offset": layout.values_offset,
        "counts_offset": layout.counts_offset,
        "indices_offset": layout.indices_offset,
        "VALUE": CODES[layout.value_dtype],
        "INDEX_BYTES": layout.index_bytes,
        "MAX_COUNT": min(layout.max_count, TILE),
        "WHOLE": layout.block == WHOLE_PIECE,
        "BLOCK": min(layout.block, TILE),
        "CHUNKS": layout.payload_chunks,
    }


@jit
def place_of(element, number, chunk, wire):  # type: ignore[no-untyped-def]
    """Returns where elements of tile ``number`` of a piece lie behind the first of the tile's rounds, see `shares.py`."""
    if wire.CHUNKS == 1:
        return element
    else:
        turn = (number * 40503 & 0xFFFF) * wire.CHUNKS >> 16  # shares.TURN
        return (element // 256 * wire.CHUNKS + (turn + chunk) % wire.CHUNKS) * 256 + element % 256  # shares.UNIT


@jit
def as_values(pointer, VALUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a pointer to the bits of values of the dtype with the code VALUE."""
    if VALUE == 0:
        return pointer.to(tl.pointer_type(tl.int32))
    elif VALUE == 3:
        return pointer.to(tl.pointer_type(tl.int8))
    else:
        return pointer.to(tl.pointer_type(tl.int16))


@jit
def as_indices(pointer, INDEX_BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a pointer to counts or indices."""
    if INDEX_BYTES == 1:
        return pointer.to(tl.pointer_type(tl.uint8))
    elif INDEX_BYTES == 2:
        return pointer.to(tl.pointer_type(tl.uint16))
    else:
        return pointer.to(tl.pointer_type(tl.int32))


@jit
def scale_pointer(payload, chunk, number, wire):  # type: ignore[no-untyped-def]
    """Where the scale of tile ``number`` of a chunk lies in the payload."""
    return payload.to(tl.pointer_type(tl.float32)) + chunk * (wire.chunk_bytes // 4) + number
