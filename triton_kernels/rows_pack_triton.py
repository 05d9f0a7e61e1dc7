"""``pack_rows`` on the device: one program for each row, which stays in registers while its cut is searched."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.layout import RowLayout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_float, as_stored, rounded_bits
from dct_compile.triton_kernels.row_codec_triton import power_of_two, store_bytes, warps_for
from dct_compile.triton_kernels.rows_pack import INF_KEY, laplace_factor


@jit
def pack_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, WIDTH]
    payload_ptr,  # uint8 [rows, ROW_BYTES]
    bound,  # float32: the least eligible magnitude; if LAPLACE, over mean|x|
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    LAPLACE: tl.constexpr,
    SOURCE: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Writes the largest CAPACITY eligible entries of a row, by ascending index."""
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
    # Halve [low, high) until at least CAPACITY keys reach low and fewer reach high, or until exactly CAPACITY reach low. Nothing to do
    # where all that is eligible fits.
    high = tl.max(key, axis=0) + 1
    high = tl.where(tl.sum((key >= low).to(tl.int32), axis=0) <= CAPACITY, low + 1, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        low = tl.where(count >= CAPACITY, middle, low)
        high = tl.where(count > CAPACITY, high, tl.where(count == CAPACITY, middle + 1, middle))
    tied = (key == low).to(tl.int32)
    above = (key > low).to(tl.int32)
    kept = (above + tied * (tl.cumsum(tied, axis=0) <= CAPACITY - tl.sum(above, axis=0)).to(tl.int32)) != 0
    slot = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    values = payload_ptr + row * ROW_BYTES
    indices = values + CAPACITY * VALUE_BYTES
    store_bytes(values + slot * VALUE_BYTES, rounded_bits(x, VALUE, True), kept, VALUE_BYTES)
    store_bytes(indices + slot * INDEX_BYTES, column, kept, INDEX_BYTES)
    free = tl.arange(0, ENTRIES)
    is_free = (free >= tl.sum(kept.to(tl.int32), axis=0)) & (free < CAPACITY)
    zero = tl.zeros([ENTRIES], tl.int32)
    store_bytes(values + free * VALUE_BYTES, zero, is_free, VALUE_BYTES)
    store_bytes(indices + free * INDEX_BYTES, zero, is_free, INDEX_BYTES)


@torch.no_grad()
def pack_rows_triton(x: Tensor, layout: RowLayout, method: str, density: float, fixed: float) -> Tensor:
    """Computes `pack_rows_reference` with Triton. No host sync."""
    x = x.contiguous()
    payload = torch.empty(x.shape[0], layout.inner * layout.row_bytes, dtype=torch.uint8, device=x.device)
    if payload.numel() == 0:
        return payload
    block = power_of_two(layout.width)
    bound = laplace_factor(density) if method == "laplace" else float(fixed) if method == "fixed" else 0.0
    launch(pack_rows_kernel, (x.shape[0] * layout.inner,))(
        as_stored(x),
        payload,
        bound,
        WIDTH=layout.width,
        CAPACITY=layout.capacity,
        LAPLACE=method == "laplace",
        SOURCE=CODES[x.dtype],
        VALUE=CODES[layout.value_dtype],
        VALUE_BYTES=layout.value_dtype.itemsize,
        INDEX_BYTES=layout.index_bytes,
        ROW_BYTES=layout.row_bytes,
        INFINITY=INF_KEY,
        BLOCK=block,
        ENTRIES=power_of_two(layout.capacity),
        num_warps=warps_for(block),
    )
    return payload
