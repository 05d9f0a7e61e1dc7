"""``quantize_rows`` and ``dequantize_rows`` on the device: one program for each row, or part of a row."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.layout import quantized_row_bytes
from dct_compile.triton_kernels.number_formats_triton import CODES, as_bits, as_float, as_stored, rounded_bits, rounded_product
from dct_compile.triton_kernels.quantize import largest_code
from dct_compile.triton_kernels.row_codec_triton import load_bytes, power_of_two, store_bytes, warps_for


@jit
def mix(h):  # type: ignore[no-untyped-def]
    """Computes `quantize._mix` for uint32."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@jit
def row_codes(x, scale, seed, row, column, WIDTH: tl.constexpr, QMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns int32 codes of ``x`` at ``column`` of ``row`` (int64); 0 where there is no scale."""
    number = (row * ((WIDTH + 31) // 32) + column // 32) * 16 + column % 16  # quantize.SHARED
    upper = mix((seed >> 32).to(tl.uint32) ^ mix((number >> 32).to(tl.uint32)))
    h = mix(number.to(tl.uint32) ^ mix(seed.to(tl.uint32) ^ upper))
    half = tl.where(column % 32 < 16, h & 0xFFFF, h >> 16).to(tl.int32)
    random = (2 * (half ^ 0x8000) - 0xFFFF).to(tl.float32)  # in units of 2^-17
    reciprocal = tl.div_rn(tl.full([1], 1.0, tl.float32), tl.where(scale > 0.0, scale, 1.0))
    # The product with a power of two is exact, so that it makes no difference that it is fused with the sum; the other one is rounded.
    moved = tl.where(scale > 0.0, tl.fma(random, 7.62939453125e-06, rounded_product(x, reciprocal)), 0.0)
    # Up there the distance between float32 numbers is 1: the sum is rounded to even, and its last bits are the code.
    code = (moved + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.minimum(tl.maximum(code, -QMAX), QMAX)


@jit
def quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, WIDTH]
    seed_ptr,  # int64 [1]
    payload_ptr,  # uint8 [rows, ROW_BYTES]
    WIDTH: tl.constexpr,
    SOURCE: tl.constexpr,
    QMAX: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes scale and codes of a row; each byte of codes holds ENTRIES of them."""
    row = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr)
    column = tl.arange(0, BLOCK) * ENTRIES
    start = row * WIDTH
    x = as_float(tl.load(x_ptr + start + column, mask=column < WIDTH, other=0), SOURCE)
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    if ENTRIES == 2:
        second = as_float(tl.load(x_ptr + start + column + 1, mask=column + 1 < WIDTH, other=0), SOURCE)
        largest = tl.maximum(largest, tl.max(second.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0))
    amax = tl.zeros([1], tl.float32) + largest.to(tl.float32, bitcast=True)
    exact = tl.maximum(tl.div_rn(amax, tl.full([1], QMAX, tl.float32)), 1.1754943508222875e-38)
    # Rounded up to bfloat16: just less than one unit of the kept half is added to the bits.
    scale_bits = (exact.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    scale_bits = tl.where(largest == 0, 0, tl.where(largest >= 0x7F800000, 0x7FC0, scale_bits))
    scale = (scale_bits << 16).to(tl.float32, bitcast=True)
    out = payload_ptr + row * ROW_BYTES
    store_bytes(out + tl.zeros([1], tl.int32), scale_bits, tl.full([1], 1, tl.int1), 2)
    code = row_codes(x, scale, seed, row, column, WIDTH, QMAX) & 255
    if ENTRIES == 2:
        upper = row_codes(second, scale, seed, row, column + 1, WIDTH, QMAX)
        code = (code & 15) | tl.where(column + 1 < WIDTH, (upper & 15) << 4, 0)
    tl.store(out + 2 + column // ENTRIES, code.to(tl.uint8), mask=column < WIDTH)


@jit
def dequantize_rows_kernel(  # type: ignore[no-untyped-def]
    payload_ptr,  # uint8 [rows, ROW_BYTES]
    out_ptr,  # integers of the output's size [rows, WIDTH]
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    OUT: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a part of a row: code * scale, kept in the range of the output."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    packed = payload_ptr + row * ROW_BYTES
    scale = (load_bytes(packed + tl.zeros_like(column), inside, 2) << 16).to(tl.float32, bitcast=True)
    code = tl.load(packed + 2 + column // ENTRIES, mask=inside, other=0).to(tl.int32)
    if ENTRIES == 2:
        code = (code >> (4 * (column % 2))) & 15
        code = (code ^ 8) - 8
    else:
        code = (code ^ 128) - 128
    value = code.to(tl.float32) * scale
    value = tl.where(value > LARGEST, LARGEST, tl.where(value < -LARGEST, -LARGEST, value))
    tl.store(out_ptr + row * WIDTH + column, rounded_bits(value, OUT, True), mask=inside)


@torch.no_grad()
def quantize_rows_triton(x: Tensor, seed: Tensor, bits: int) -> Tensor:
    """Computes `quantize_rows_reference` with Triton. No host sync."""
    width, inner = x.shape[-1], math.prod(x.shape[1:-1])
    columns = quantized_row_bytes(width, bits)
    payload = torch.empty(x.shape[0], inner * columns, dtype=torch.uint8, device=x.device)
    if payload.numel() == 0:
        return payload
    entries = 8 // bits
    block = power_of_two(-(-width // entries))
    x = x.contiguous()
    launch(quantize_rows_kernel, (x.shape[0] * inner,))(
        as_stored(x),
        seed,
        payload,
        WIDTH=width,
        SOURCE=CODES[x.dtype],
        QMAX=largest_code(bits),
        ENTRIES=entries,
        ROW_BYTES=columns,
        BLOCK=block,
        num_warps=warps_for(block * entries),
    )
    return payload


@torch.no_grad()
def dequantize_rows_triton(payload: Tensor, row_shape: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """Computes `dequantize_rows_reference` with Triton. No host sync."""
    width = row_shape[-1]
    out = torch.empty(payload.shape[0], *row_shape, dtype=dtype, device=payload.device)
    if out.numel() == 0:
        return out
    block = min(power_of_two(width), 1024)
    launch(dequantize_rows_kernel, (out.numel() // width, -(-width // block)))(
        payload.contiguous(),
        as_bits(out),
        WIDTH=width,
        ENTRIES=8 // bits,
        ROW_BYTES=quantized_row_bytes(width, bits),
        OUT=CODES[dtype],
        LARGEST=torch.finfo(dtype).max,
        BLOCK=block,
        num_warps=warps_for(block),
    )
    return out
