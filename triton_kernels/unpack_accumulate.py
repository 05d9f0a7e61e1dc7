"""Turn the payloads that a collective gathered back into a gradient bucket: their sum, divided."""

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import TILE, GradientLayout
from dct_compile.triton_kernels.shares import place_of
from dct_compile.triton_kernels.threshold_pack import chunk_view, unsigned


def uncovered_ranges(layout: GradientLayout, numel: int) -> tuple[tuple[int, int], ...]:
    """Returns the parts ``(offset, size)`` of a bucket of ``numel`` elements that no segment covers, in order.

    An owner's buffer has none.
    """
    if layout.chunk >= 0:
        return ()
    ranges: list[tuple[int, int]] = []
    end = 0
    for offset, size in sorted(layout.segments):
        if offset > end:
            ranges.append((end, offset - end))
        end = max(end, offset + size)
    if numel > end:
        ranges.append((end, numel - end))
    return tuple(ranges)


def _add_chunk(total: Tensor, payload: Tensor, layout: GradientLayout, chunk: int) -> None:
    """Adds the entries of a chunk. Of a damaged one, those beyond the capacity or their block are left out."""
    view = chunk_view(payload, layout)
    ends = unsigned(view.counts, layout).cumsum(0).clamp(max=layout.capacity)
    in_block = ends.diff(prepend=ends.new_zeros(1))
    segments, starts, first_tiles, sizes = torch.zeros(4, *in_block.shape, dtype=torch.int64, device=in_block.device)
    for piece in layout.pieces:
        if piece.chunk == chunk:
            blocks = slice(piece.first_block, piece.first_block + piece.blocks)
            offsets = torch.arange(piece.blocks, device=starts.device) * layout.block
            segments[blocks] = piece.grad_offset
            starts[blocks] = offsets
            first_tiles[blocks] = piece.first_tile + offsets // TILE
            sizes[blocks] = (piece.numel - offsets).clamp(max=layout.block)
    block = torch.arange(in_block.numel(), device=in_block.device).repeat_interleave(in_block)
    indices = unsigned(view.indices[: block.numel()], layout)
    inside = indices < sizes[block]
    block, indices, values = block[inside], indices[inside], view.values[: inside.numel()][inside].float()
    if layout.value_dtype == torch.int8:
        values = values * view.scales[first_tiles[block] + indices // TILE]
    places = place_of(starts[block] + indices, layout.payload_chunks, chunk)
    total[segments[block] + places] += values  # an index occurs once in a payload


def finish(total: Tensor, dense: Tensor | None, dtype: torch.dtype, layout: GradientLayout, divisor: int) -> Tensor:
    """Returns the sum over the divisor, with the dense elements put in.

    The divisor is a tensor: for a number, CUDA would multiply with the reciprocal.
    """
    result = (total if divisor == 1 else total / total.new_full((), divisor)).to(dtype)
    if dense is not None:
        start = 0
        for offset, size in uncovered_ranges(layout, total.numel()):
            result[offset : offset + size] = dense[start : start + size]
            start += size
    return result


@torch.no_grad()
def unpack_accumulate_reference(
    gathered: Tensor, dense: Tensor | None, numel: int, dtype: torch.dtype, layout: GradientLayout, divisor: int
) -> Tensor:
    """Returns the bucket ``dtype`` [numel] of the gathered payloads: entries summed in float32 in payload order, over ``divisor``.

    Args:
        gathered: uint8 [M * layout.chunk_bytes]. For ``chunk == -1`` the j-th chunk payload covers chunk ``j % chunks`` of the bucket; for
            ``chunk >= 0`` every one covers the owner's compact buffer, which is the result.
        dense: The elements of the bucket that no segment covers, in order, of any float dtype, copied; without it they are 0.
        numel: Elements of the result.
        dtype: Dtype of the result.
        layout: The geometry of the payloads.
        divisor: The divisor of the sums.
    """
    total = torch.zeros(numel, dtype=torch.float32, device=gathered.device)
    for j in range(gathered.numel() // max(layout.chunk_bytes, 1)):
        _add_chunk(total, gathered[j * layout.chunk_bytes : (j + 1) * layout.chunk_bytes], layout, j % layout.payload_chunks)
    return finish(total, dense, dtype, layout, divisor)


@torch.no_grad()
def unpack_into_reference(out: Tensor, gathered: Tensor, dense: Tensor | None, layout: GradientLayout, divisor: int) -> None:
    """Writes the result of `unpack_accumulate_reference` to ``out`` [numel], of the dtype that it is to have; all of it is overwritten."""
    out.data.copy_(unpack_accumulate_reference(gathered, dense, out.numel(), out.dtype, layout, divisor))
