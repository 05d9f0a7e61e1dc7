"""``unpack_rows``, ``gather_rows``, ``scatter_rows`` on the device.

A dense row is not scattered into: each of its elements searches its entry by halving (indices ascend). So every element is written once,
by one thread, sums have one order, and a damaged payload cannot write outside its row.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.layout import RowLayout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_bits, as_float, as_stored, float_of_bits, rounded_bits
from dct_compile.triton_kernels.row_codec_triton import load_bytes, power_of_two, warps_for


@jit
def find_entries(packed, column, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, VALUE_BYTES: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Finds the entry of each ``column`` of the row at ``packed``.

    Returns its number, and whether there is one. If there is none, the number means nothing.
    """
    INDEX_BYTES: tl.constexpr = 1 if WIDTH <= 256 else 2
    indices = packed + CAPACITY * VALUE_BYTES
    entry = tl.zeros_like(column)
    for step in tl.static_range(STEPS):
        last = entry + (1 << (STEPS - 1 - step)) - 1
        index = load_bytes(indices + last * INDEX_BYTES, last < CAPACITY, INDEX_BYTES)
        # Free entries hold index 0 behind the valid ones: past every column, as they are for this search.
        before = (last < CAPACITY) & (index < column) & ((index != 0) | (last == 0))
        entry = tl.where(before, last + 1, entry)
    index = load_bytes(indices + entry * INDEX_BYTES, entry < CAPACITY, INDEX_BYTES)
    has_value = (entry != 0) | ((load_bytes(packed + entry * VALUE_BYTES, entry == 0, VALUE_BYTES) << (33 - 8 * VALUE_BYTES)) != 0)
    return entry, (entry < CAPACITY) & (index == column) & ((entry == 0) | (index != 0)) & has_value & (column < WIDTH)


@jit
def dense_rows_kernel(  # type: ignore[no-untyped-def]
    payload_ptr,  # uint8 [ADDENDS * rows, ROW_BYTES], or [rows, ROW_BYTES] with VALUES_APART
    values_ptr,  # with VALUES_APART: [ADDENDS * rows, CAPACITY]
    out_ptr,  # integers of the output's size [rows, WIDTH]
    rows,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    STEPS: tl.constexpr,
    ADDENDS: tl.constexpr,
    VALUES_APART: tl.constexpr,
    PAYLOAD_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    VALUE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes a part of a dense row: at each index the sum of the addends' values, in float32 and in their order."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    source = row
    if VALUES_APART:
        entry, valid = find_entries(payload_ptr + row * ROW_BYTES, column, WIDTH, CAPACITY, PAYLOAD_BYTES, STEPS)
        for _ in range(ADDENDS):
            total += as_float(tl.load(values_ptr + source * CAPACITY + entry, mask=valid, other=0), VALUE)
            source += rows
    else:
        for _ in range(ADDENDS):
            packed = payload_ptr + source * ROW_BYTES
            entry, valid = find_entries(packed, column, WIDTH, CAPACITY, PAYLOAD_BYTES, STEPS)
            total += float_of_bits(load_bytes(packed + entry * PAYLOAD_BYTES, valid, PAYLOAD_BYTES), VALUE)
            source += rows
    tl.store(out_ptr + row * WIDTH + column, rounded_bits(total, OUT, False), mask=column < WIDTH)


@jit
def gather_rows_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [grad_rows, WIDTH]
    payload_ptr,  # uint8 [rows, ROW_BYTES]
    out_ptr,  # integers of the values' size [rows, CAPACITY]
    grad_rows,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    PAYLOAD_BYTES: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SOURCE: tl.constexpr,
    VALUE: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Writes the gradient at the valid indices of one packed row."""
    INDEX_BYTES: tl.constexpr = 1 if WIDTH <= 256 else 2
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    inside = entry < CAPACITY
    packed = payload_ptr + row * ROW_BYTES
    index = load_bytes(packed + CAPACITY * PAYLOAD_BYTES + entry * INDEX_BYTES, inside, INDEX_BYTES)
    first = load_bytes(packed + entry * PAYLOAD_BYTES, entry == 0, PAYLOAD_BYTES) << (33 - 8 * PAYLOAD_BYTES)  # its sign is shifted out
    valid = inside & tl.where(entry == 0, first != 0, index != 0) & (index < WIDTH)
    grad = as_float(tl.load(grad_ptr + row % grad_rows * WIDTH + index, mask=valid, other=0), SOURCE)
    tl.store(out_ptr + row * CAPACITY + entry, rounded_bits(grad, VALUE, True), mask=inside)


def _dense_rows(payload: Tensor, values: Tensor | None, out: Tensor, layout: RowLayout, addends: int) -> Tensor:
    if out.numel() == 0:
        return out
    block = min(power_of_two(layout.width), 1024)
    rows = out.numel() // layout.width
    launch(dense_rows_kernel, (rows, -(-layout.width // block)))(
        payload.contiguous(),
        payload if values is None else as_stored(values.contiguous()),
        as_bits(out),
        rows,
        WIDTH=layout.width,
        CAPACITY=layout.capacity,
        STEPS=layout.capacity.bit_length(),
        ADDENDS=addends,
        VALUES_APART=values is not None,
        PAYLOAD_BYTES=layout.value_dtype.itemsize,
        ROW_BYTES=layout.row_bytes,
        VALUE=CODES[layout.value_dtype if values is None else values.dtype],
        OUT=CODES[out.dtype],
        BLOCK=block,
        num_warps=warps_for(block),
    )
    return out


@torch.no_grad()
def unpack_rows_triton(payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    """Computes `unpack_rows_reference` with Triton. No host sync."""
    out = torch.empty(payload.shape[0] // addends, *layout.row_shape, dtype=dtype, device=payload.device)
    return _dense_rows(payload, None, out, layout, addends)


@torch.no_grad()
def scatter_rows_triton(values: Tensor, payload: Tensor, layout: RowLayout, addends: int, dtype: torch.dtype) -> Tensor:
    """Computes `scatter_rows_reference` with Triton. No host sync."""
    out = torch.empty(payload.shape[0], *layout.row_shape, dtype=dtype, device=payload.device)
    return _dense_rows(payload, values, out, layout, addends)


@torch.no_grad()
def gather_rows_triton(grad: Tensor, payload: Tensor, layout: RowLayout, value_dtype: torch.dtype) -> Tensor:
    """Computes `gather_rows_reference` with Triton. No host sync."""
    out = torch.empty(payload.shape[0], layout.inner * layout.capacity, dtype=value_dtype, device=payload.device)
    if out.numel() == 0:
        return out
    block = power_of_two(layout.capacity)
    launch(gather_rows_kernel, (payload.shape[0] * layout.inner,))(
        as_stored(grad.contiguous()),
        payload.contiguous(),
        as_bits(out),
        grad.shape[0] * layout.inner,
        WIDTH=layout.width,
        CAPACITY=layout.capacity,
        PAYLOAD_BYTES=layout.value_dtype.itemsize,
        ROW_BYTES=layout.row_bytes,
        SOURCE=CODES[grad.dtype],
        VALUE=CODES[value_dtype],
        ENTRIES=block,
        num_warps=warps_for(block),
    )
    return out
