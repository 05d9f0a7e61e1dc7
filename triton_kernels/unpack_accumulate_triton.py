"""`unpack_accumulate` on the device: one launch for each payload, so that their order on the stream is the order of the additions."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_checks import check_gathered
from dct_compile.triton_kernels.gradient_tables import block_table, piece_table
from dct_compile.triton_kernels.layout import gradient_layout
from dct_compile.triton_kernels.unpack_accumulate import finish


@jit
def add_kernel(  # type: ignore[no-untyped-def]
    values_ptr,  # value dtype: gathered, seen as values
    places_ptr,  # uint8 or int16: gathered, seen as counts and indices
    first_ptr,  # int64 [payloads, blocks_per_chunk]: the block's first entry in its payload
    blocks_ptr,  # int64 [blocks, 4]
    pieces_ptr,  # int64 [pieces, 6]
    total_ptr,  # float32 [numel]
    payload_offset,  # the chunk payload of chunk 0 that is added in this launch
    CHUNK_BYTES: tl.constexpr,
    COUNTS_OFFSET: tl.constexpr,
    INDICES_OFFSET: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds one payload's entries of a block to the total. Within a payload an index occurs once: no two lanes meet."""
    block = tl.program_id(0).to(tl.int64)
    grad_start = tl.load(blocks_ptr + block * 4)
    size = tl.load(blocks_ptr + block * 4 + 2)
    piece = tl.load(blocks_ptr + block * 4 + 3)
    payload = payload_offset + tl.load(pieces_ptr + piece * 6 + 1)
    chunk_block = tl.load(pieces_ptr + piece * 6 + 3) + block - tl.load(pieces_ptr + piece * 6 + 4)
    places = places_ptr + payload * (CHUNK_BYTES // INDEX_BYTES)
    count = tl.load(places + COUNTS_OFFSET // INDEX_BYTES + chunk_block).to(tl.int32) & (256 * 256 - 1 if INDEX_BYTES == 2 else 255)
    entry = tl.load(first_ptr + payload * BLOCKS_PER_CHUNK + chunk_block) + tl.arange(0, BLOCK)
    valid = (tl.arange(0, BLOCK) < count) & (entry < CAPACITY)
    index = tl.load(places + INDICES_OFFSET // INDEX_BYTES + entry, mask=valid, other=0).to(tl.int32)
    index = index & (256 * 256 - 1 if INDEX_BYTES == 2 else 255)
    valid = valid & (index < size)
    value = tl.load(values_ptr + payload * (CHUNK_BYTES // VALUE_BYTES) + entry, mask=valid, other=0.0).to(tl.float32)
    target = total_ptr + grad_start + index
    tl.store(target, tl.load(target, mask=valid, other=0.0) + value, mask=valid)


@torch.no_grad()
def unpack_accumulate_triton(
    gathered: Tensor,
    dense: Tensor | None,
    numel: int,
    dtype: torch.dtype,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    divisor: int,
) -> Tensor:
    """`unpack_accumulate_reference` with Triton. No host sync."""
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    payloads = check_gathered(gathered, layout, dense, numel)
    total = torch.zeros(numel, dtype=torch.float32, device=gathered.device)
    blocks = block_table(layout, gathered.device)
    if blocks.shape[0] == 0:
        return finish(total, dense, dtype, layout, divisor)
    gathered = gathered.contiguous()
    places = gathered if layout.index_bytes == 1 else gathered.view(torch.int16)
    columns = slice(layout.counts_offset // layout.index_bytes, layout.indices_offset // layout.index_bytes)
    counts = places.view(payloads, -1)[:, columns].long() & (2 ** (8 * layout.index_bytes) - 1)
    first = counts.cumsum(1) - counts
    for payload in range(0, payloads, layout.payload_chunks):
        add_kernel[(blocks.shape[0],)](
            gathered.view(value_dtype),
            places,
            first,
            blocks,
            piece_table(layout, gathered.device),
            total,
            payload,
            CHUNK_BYTES=layout.chunk_bytes,
            COUNTS_OFFSET=layout.counts_offset,
            INDICES_OFFSET=layout.indices_offset,
            INDEX_BYTES=layout.index_bytes,
            VALUE_BYTES=value_dtype.itemsize,
            BLOCKS_PER_CHUNK=layout.blocks_per_chunk,
            CAPACITY=layout.capacity,
            BLOCK=block,
        )
    return finish(total, dense, dtype, layout, divisor)
