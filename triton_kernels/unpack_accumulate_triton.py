"""`unpack_accumulate` on the device: one launch for what segments cover, one for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import launch
from dct_compile.triton_kernels.gradient_tables import device_table, piece_table, tile_table
from dct_compile.triton_kernels.layout import TILE, GradientLayout
from dct_compile.triton_kernels.number_formats_triton import CODES, as_bits, as_stored
from dct_compile.triton_kernels.threshold_pack import INDEX_DTYPES
from dct_compile.triton_kernels.unpack_accumulate import uncovered_ranges
from dct_compile.triton_kernels.unpack_kernels_triton import fill_kernel, unpack_kernel
from dct_compile.triton_kernels.wire_triton import wire_arguments

PART = 1024
"""Elements of a tile that a program clears or divides at a time."""
STEP = 128
"""Entries that it adds at a time."""
WARPS = 4


@device_table
def _gap_table(layout: GradientLayout, numel: int, device: torch.device) -> Tensor:
    rows = []
    start = 0
    for offset, size in uncovered_ranges(layout, numel):
        rows += [[offset + first, start + first, min(TILE, size - first)] for first in range(0, size, TILE)]
        start += size
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)


def entries_reached(gathered: Tensor, layout: GradientLayout) -> Tensor:
    """int64 [payloads, layout.blocks_per_chunk]: the entries of each payload up to the end of each of its blocks."""
    rows = gathered.view(INDEX_DTYPES[layout.index_bytes]).view(-1, layout.chunk_bytes // layout.index_bytes)
    counts = rows.narrow(1, layout.counts_offset // layout.index_bytes, layout.blocks_per_chunk)
    if layout.index_bytes == 2:
        counts = counts.int() & 0xFFFF  # read as signed
    if layout.index_bytes == 4:
        counts = counts.clamp(min=0)  # above 2 ** 31 only in a damaged payload
    return counts.cumsum(1, dtype=torch.int64)


def gathered_arguments(gathered: Tensor, layout: GradientLayout) -> dict[str, object]:
    """Returns the fields of `Gathered`, as arguments of a kernel."""
    payloads = gathered.contiguous()
    return {
        "payloads_ptr": payloads,
        "reached_ptr": entries_reached(payloads, layout),
        "rounds": payloads.numel() // layout.payload_bytes,
        "chunks": layout.payload_chunks,
        "blocks_per_chunk": layout.blocks_per_chunk,
        "capacity": layout.capacity,
    }


@torch.no_grad()
def unpack_accumulate_triton(
    gathered: Tensor, dense: Tensor | None, numel: int, dtype: torch.dtype, layout: GradientLayout, divisor: int
) -> Tensor:
    """`unpack_accumulate_reference` with Triton. No host sync; the order of the additions is that of the payloads."""
    out = torch.empty(numel, dtype=dtype, device=gathered.device)
    unpack_into_triton(out, gathered, dense, layout, divisor)
    return out


@torch.no_grad()
def unpack_into_triton(out: Tensor, gathered: Tensor, dense: Tensor | None, layout: GradientLayout, divisor: int) -> None:
    """`unpack_into_reference` with Triton."""
    device, numel, dtype = out.device, out.numel(), out.dtype
    tiles = tile_table(layout, device)
    if tiles.shape[0]:
        total = out if dtype == torch.float32 else torch.empty(numel, dtype=torch.float32, device=device)
        launch(unpack_kernel, (tiles.shape[0],))(
            **gathered_arguments(gathered, layout),
            tiles_ptr=tiles,
            tile_count=tiles.shape[0],
            pieces_ptr=piece_table(layout, device),
            total_ptr=total,
            out_ptr=as_bits(out),
            divisor=float(divisor),
            **wire_arguments(layout),
            PART=PART,
            TILE=TILE,
            STEP=STEP,
            OUT=CODES[dtype],
            num_warps=WARPS,
        )
    gaps = _gap_table(layout, numel, device)
    if gaps.shape[0]:
        source = out if dense is None else dense.contiguous()
        options = {"OUT": CODES[dtype], "DENSE": CODES[source.dtype], "HAS_DENSE": dense is not None}
        launch(fill_kernel, (gaps.shape[0],))(as_stored(source), as_bits(out), gaps, TILE=TILE, **options)
