"""Parts of the row kernels: values that stand at any byte, launch shapes."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from dct_compile.triton_kernels.compat import jit, tl


def power_of_two(n: int) -> int:
    """Returns the least power of two that is not less than ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def warps_for(block: int) -> int:
    """Warps that hold ``block`` entries in registers: 8 entries in each thread, up to 16 warps."""
    return min(max(block // 256, 1), 16)


@jit
def store_bytes(pointer, bits, mask, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Little-endian, at any address: a row of a payload may have an odd number of bytes."""
    for byte in tl.static_range(BYTES):
        tl.store(pointer + byte, ((bits >> (8 * byte)) & 255).to(tl.uint8), mask=mask)


@jit
def load_bytes(pointer, mask, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 of little-endian bytes at any address; 0 outside the mask."""
    bits = tl.load(pointer, mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, BYTES):
        bits |= tl.load(pointer + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
    return bits
