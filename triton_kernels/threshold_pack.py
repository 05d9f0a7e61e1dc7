"""Compress a gradient bucket: add the residual, keep what reaches the threshold, write it to a payload, keep the rest for the next step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import TILE, GradientLayout, Piece
from dct_compile.triton_kernels.shares import place_of

INDEX_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
LARGEST_CODE = 127
"""Codes of int8 values are -127 ... 127; a tile with non-finite entries has an infinite scale and codes 1 (inf), -1 (-inf), 0 (NaN)."""


@dataclass(frozen=True)
class ChunkView:
    """One chunk's bytes as views: counts and indices of 2 and 4 bytes look signed, see `unsigned`; scales are empty but for int8 values."""

    scales: Tensor
    values: Tensor
    counts: Tensor
    indices: Tensor


def chunk_view(payload: Tensor, layout: GradientLayout) -> ChunkView:
    """Views of one chunk's bytes, ``payload``: uint8 [layout.chunk_bytes]."""
    index_dtype = INDEX_DTYPES[layout.index_bytes]
    return ChunkView(
        payload[: layout.values_offset].view(torch.float32),
        payload[layout.values_offset :][: layout.capacity * layout.value_dtype.itemsize].view(layout.value_dtype),
        payload[layout.counts_offset : layout.indices_offset].view(index_dtype),
        payload[layout.indices_offset :][: layout.capacity * layout.index_bytes].view(index_dtype),
    )


def unsigned(counts_or_indices: Tensor, layout: GradientLayout) -> Tensor:
    """int64 of what `ChunkView` shows as signed."""
    return counts_or_indices.long().bitwise_and(2 ** (8 * layout.index_bytes) - 1)


def round_to_wire(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 rounded to nearest even; what is finite stays finite, a NaN becomes the canonical one."""
    largest = torch.finfo(dtype).max
    rounded = torch.where(w.isinf(), w, w.clamp(-largest, largest)).to(dtype)
    return rounded.masked_fill(w.isnan(), float("nan"))


def tile_scales(w: Tensor, candidates: Tensor) -> Tensor:
    """float32 [tiles]: the largest magnitude among each tile's candidates over `LARGEST_CODE`; infinite where one is not finite."""
    magnitudes = torch.where(candidates, w.abs(), 0.0)
    tiles = torch.nn.functional.pad(magnitudes, (0, -w.numel() % TILE)).view(-1, TILE)
    return torch.where(tiles.isfinite().all(1), tiles.amax(1) * (1.0 / LARGEST_CODE), float("inf"))


def encode_with_scale(w: Tensor, scale: Tensor) -> Tensor:
    """int8 codes of ``w``, each with its own ``scale``: rounded to nearest even, 0 where the scale is 0.

    The least denormals have scales of so few bits that a quotient may be larger than `LARGEST_CODE`.
    """
    finite = torch.where(scale > 0, w / scale, 0.0).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return torch.where(scale.isinf(), w.sign().nan_to_num(0.0), finite).to(torch.int8)


def window_mask(candidates: Tensor, capacity: int, step: int) -> Tensor:
    """Returns the candidates that are sent: all if they fit, else ``capacity`` of them, cyclically from one that moves on at each step."""
    total = int(candidates.sum())
    if total <= capacity:
        return candidates
    rank = candidates.cumsum(0) - 1
    return candidates & ((rank - step * capacity % total) % total < capacity)


def first_of_block(candidates: Tensor, layout: GradientLayout) -> Tensor:
    """Returns the candidates that their block's count can express: the first ``layout.max_count`` of each block."""
    if layout.max_count == layout.block:
        return candidates
    rows = torch.nn.functional.pad(candidates, (0, -candidates.numel() % layout.block)).view(-1, layout.block)
    return (rows & (rows.cumsum(1) <= layout.max_count)).view(-1)[: candidates.numel()]


def encode(w: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Wire values of the entries ``w``, and what they stand for as float32. ``scale``: of each entry's tile, used for int8 alone."""
    if dtype == torch.int8:
        codes = encode_with_scale(w, scale)
        return codes, codes.float() * scale
    values = round_to_wire(w, dtype)
    return values, values.float()


def _write_piece(w: Tensor, candidates: Tensor, kept: Tensor, piece: Piece, base: int, layout: GradientLayout, chunk: ChunkView) -> Tensor:
    """Write one piece's kept entries behind the ``base`` earlier ones; returns what was sent, as float32 [kept entries]."""
    positions = kept.nonzero().view(-1)
    scales = tile_scales(w, candidates)
    values, sent = encode(w[positions], scales[positions // TILE], layout.value_dtype)
    chunk.values[base : base + positions.numel()] = values
    chunk.indices[base : base + positions.numel()] = (positions % layout.block).to(chunk.indices.dtype)
    in_block = torch.bincount(positions // layout.block, minlength=piece.blocks)
    chunk.counts[piece.first_block : piece.first_block + piece.blocks] = in_block.to(chunk.counts.dtype)
    if layout.value_dtype == torch.int8:
        chunk.scales[piece.first_tile : piece.first_tile + piece.tiles] = scales
    return sent


def _places(piece: Piece, layout: GradientLayout, device: torch.device) -> slice | Tensor:
    """Returns where the elements of a piece lie, counted from its offset."""
    if layout.payload_chunks == 1:
        return slice(piece.numel)
    return place_of(torch.arange(piece.numel, device=device), layout.chunks, piece.chunk)


def _gradient(grad: Tensor, piece: Piece, layout: GradientLayout) -> Tensor:
    return grad[piece.grad_offset :][_places(piece, layout, grad.device)].float()


def _state(residual: Tensor, piece: Piece, layout: GradientLayout) -> Tensor:
    return residual[piece.state_offset :][_places(piece, layout, residual.device)]


def _set_state(residual: Tensor, piece: Piece, layout: GradientLayout, state: Tensor) -> None:
    residual.data[piece.state_offset :][_places(piece, layout, residual.device)] = state


@torch.no_grad()
def threshold_pack_reference(
    grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor, layout: GradientLayout, error_feedback: bool
) -> Tensor:
    """Hard threshold with error feedback ([Gupta21] Alg. 1) into a payload of fixed size: uint8 [layout.payload_bytes].

    ``grad`` [numel] float32, bfloat16 or float16; ``residual`` [state_numel] float32, mutated; ``threshold`` [S] float32; ``counters``
    [S, COUNTERS] int64 (see ``layout.COUNTERS``), mutated. With W = grad + residual (grad alone without error feedback) an element is a
    candidate if abs(W) >= threshold and W != 0. Candidates beyond what a block can count or a piece can hold are not sent but stay in
    the residual; which ones a full piece sends moves on with the step, so that each has its turn. After the call, for float32 W,
    ``float(sent) + residual == W`` exactly.

    If a W of the bucket is not finite the step is *held*: only such elements are sent, as they are, and counters and residual stay, the
    latter but for one rounding of the sum: it becomes W - grad, wherever adding the gradient once more gives a finite number. The column
    of entries kept in the last step becomes 0, so that a threshold follows each step once.
    """
    payload = grad.new_zeros(layout.payload_bytes, dtype=torch.uint8)
    views = [chunk_view(payload[number * layout.chunk_bytes :][: layout.chunk_bytes], layout) for number in range(layout.payload_chunks)]
    sums = [_gradient(grad, piece, layout) + (_state(residual, piece, layout) if error_feedback else 0.0) for piece in layout.pieces]
    bases = [0] * layout.payload_chunks
    if not all(bool(w.isfinite().all()) for w in sums):
        for piece, w in zip(layout.pieces, sums, strict=True):
            again = w
            if error_feedback:
                state, gradient = torch.where(w.isfinite(), w, _state(residual, piece, layout)), _gradient(grad, piece, layout)
                again = gradient + state
                _set_state(residual, piece, layout, torch.where(again.isfinite(), state - gradient, state))
            candidates = ~again.isfinite()
            kept = window_mask(first_of_block(candidates, layout), piece.capacity, int(counters[piece.segment, 0]))
            bases[piece.chunk] += _write_piece(again, candidates, kept, piece, bases[piece.chunk], layout, views[piece.chunk]).numel()
        counters.data[:, 4] = 0
        return payload
    kept_now, overflow_now = torch.zeros(2, len(layout.segments), dtype=torch.int64, device=counters.device)
    for piece, w in zip(layout.pieces, sums, strict=True):
        candidates = (w.abs() >= threshold[piece.segment]) & (w != 0)
        kept = window_mask(first_of_block(candidates, layout), piece.capacity, int(counters[piece.segment, 0]))
        sent = _write_piece(w, candidates, kept, piece, bases[piece.chunk], layout, views[piece.chunk])
        bases[piece.chunk] += sent.numel()
        kept_now[piece.segment] += sent.numel()
        overflow_now[piece.segment] += candidates.sum() - sent.numel()
        if error_feedback:
            _set_state(residual, piece, layout, w.masked_scatter(kept, w[kept] - sent))
    counters.data[:, :3] += torch.stack([torch.ones_like(kept_now), kept_now, overflow_now], dim=1)
    counters.data[:, 3:] = torch.stack([overflow_now, kept_now], dim=1)
    return payload
