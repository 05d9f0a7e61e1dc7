"""Number formats by their bits, for all Triton kernels.

bfloat16 is read and written as 16-bit integers and float32 is rounded by integer arithmetic: compilers and Triton's interpreter leave
different NaNs, and the interpreter truncates. The *code* of a dtype is 0 for float32, 1 for bfloat16, 2 for float16, 3 for int8.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def as_stored(x: Tensor) -> Tensor:
    """Returns the tensor as kernels take it: bfloat16 as int16."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def as_bits(x: Tensor) -> Tensor:
    """Returns the tensor as kernels write it: integers of the same size."""
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


@jit
def as_float(x, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 of elements of what `as_stored` gave."""
    if CODE == 1:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def rounded_product(x, y):  # type: ignore[no-untyped-def]
    """x * y that stays rounded where it is added to something: a product that is a fused multiply-add already joins no other."""
    return tl.fma(x, y, 0.0)


@jit
def rounded_bits(x, CODE: tl.constexpr, SATURATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 -> int32 with the bits of x in the dtype, to nearest even, NaN the one quiet NaN; SATURATE keeps finite values finite."""
    raw = x.to(tl.int32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    finite = magnitude < 0x7F800000
    if CODE == 0:
        bits = raw
        nan = 0x7FC00000
    elif CODE == 1:
        nearest = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
        if SATURATE:
            nearest = tl.where(finite, tl.minimum(nearest, 0x7F7F), nearest)
        bits = nearest | ((raw >> 16) & 0x8000)
        nan = 0x7FC0
    else:
        if SATURATE:
            x = tl.where(finite, tl.minimum(tl.maximum(x, -65504.0), 65504.0), x)
        bits = x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        nan = 0x7E00
    return tl.where(magnitude > 0x7F800000, nan, bits)


@jit
def float_of_bits(bits, CODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 with the bits of a value of the dtype -> float32."""
    if CODE == 0:
        return bits.to(tl.float32, bitcast=True)
    elif CODE == 1:
        return (bits << 16).to(tl.float32, bitcast=True)
    elif CODE == 3:
        return bits.to(tl.float32)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
