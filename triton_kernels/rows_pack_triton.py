"""``pack_rows`` on the device: one program for each row, which stays in registers while its cut is searched."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import math

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.layout import row_bytes
from dct_compile.triton_kernels.number_formats_triton import CODES, as_float, as_stored, rounded_bits
from dct_compile.triton_kernels.row_codec_triton import power_of_two, store_bytes, warps_for
from dct_compile.triton_kernels.rows_pack import INF_KEY, check_pack_arguments, laplace_factor


@jit
def pack_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, WIDTH]
    payload_ptr,  # uint8 [rows, ROW_BYTES]
    bound,  # float32: the least eligible magnitude; if LAPLACE, over mean|x|
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    LAPLACE: tl.constexpr,
    SOURCE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
):
    """The largest SLOTS eligible entries of a row, by ascending place."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = as_float(tl.load(x_ptr + row * WIDTH + column, mask=column < WIDTH, other=0), SOURCE)
    key = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, INFINITY)
    bound = tl.full([], bound, tl.float32)
    if LAPLACE:
        # float64, so that the sum's order does not show in the threshold.
        mean = (tl.sum(key.to(tl.float32, bitcast=True).to(tl.float64), axis=0) / WIDTH).to(tl.float32)
        bound = mean * bound
    low = tl.minimum(tl.maximum(bound.to(tl.int32, bitcast=True), 1), INFINITY)
    # Halve [low, high) until at least SLOTS keys reach low and fewer reach high, or until exactly SLOTS reach low. Nothing to do where
    # all that is eligible has a slot.
    high = tl.max(key, axis=0) + 1
    high = tl.where(tl.sum((key >= low).to(tl.int32), axis=0) <= SLOTS, low + 1, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= SLOTS, middle, low)
        high = tl.where(count > SLOTS, high, tl.where(count == SLOTS, middle + 1, middle))
    tied = (key == low).to(tl.int32)
    above = (key > low).to(tl.int32)
    kept = (above + tied * (tl.cumsum(tied, axis=0) <= SLOTS - tl.sum(above, axis=0)).to(tl.int32)) != 0
    slot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    values = payload_ptr + row * ROW_BYTES
    indices = values + SLOTS * VALUE_BYTES
    store_bytes(values + slot * VALUE_BYTES, rounded_bits(x, VALUE, True), kept, VALUE_BYTES)
    store_bytes(indices + slot * INDEX_BYTES, column, kept, INDEX_BYTES)
    free = tl.arange(0, SLOT_BLOCK)
    is_free = (free >= tl.sum(kept.to(tl.int32), axis=0)) & (free < SLOTS)
    zero = tl.zeros([SLOT_BLOCK], tl.int32)
    store_bytes(values + free * VALUE_BYTES, zero, is_free, VALUE_BYTES)
    store_bytes(indices + free * INDEX_BYTES, zero, is_free, INDEX_BYTES)


@torch.no_grad()
def pack_rows_triton(x: Tensor, slots: int, method: str, density: float, fixed: float, value_dtype: torch.dtype) -> Tensor:
    """`pack_rows_reference` with Triton. No host sync."""
    check_pack_arguments(x, slots, method, density, fixed, value_dtype)
    width, inner = x.shape[-1], math.prod(x.shape[1:-1])
    x = x.contiguous()
    columns = row_bytes(width, slots, value_dtype)
    payload = torch.empty(x.shape[0], inner * columns, dtype=torch.uint8, device=x.device)
    if payload.numel() == 0:
        return payload
    block = power_of_two(width)
    bound = laplace_factor(density) if method == "laplace" else float(fixed) if method == "fixed" else 0.0
    launch(pack_rows_kernel, (x.shape[0] * inner,))(
        as_stored(x),
        payload,
        bound,
        WIDTH=width,
        SLOTS=slots,
        LAPLACE=method == "laplace",
        SOURCE=CODES[x.dtype],
        VALUE=CODES[value_dtype],
        VALUE_BYTES=value_dtype.itemsize,
        INDEX_BYTES=1 if width <= 256 else 2,
        ROW_BYTES=columns,
        INFINITY=INF_KEY,
        BLOCK=block,
        SLOT_BLOCK=power_of_two(slots),
        num_warps=warps_for(block),
    )
    return payload
