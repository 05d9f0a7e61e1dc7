"""Compress a gradient bucket: add the residual, keep what reaches the threshold, write it to a payload, keep the rest for the next step."""

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import GradientLayout, Piece, gradient_layout


def chunk_views(payload: Tensor, layout: GradientLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Values, counts and indices of one chunk's bytes, as views; counts and indices as uint8 or (for 16 bits) int16."""
    index_dtype = torch.uint8 if layout.index_bytes == 1 else torch.int16
    values = payload[: layout.counts_offset].view(layout.value_dtype)
    counts = payload[layout.counts_offset : layout.indices_offset].view(index_dtype)
    indices = payload[layout.indices_offset : layout.indices_offset + layout.capacity * layout.index_bytes].view(index_dtype)
    return values, counts, indices


def round_to_wire(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 rounded to nearest even; what is finite stays finite, a NaN becomes the canonical one."""
    largest = torch.finfo(dtype).max
    rounded = torch.where(w.isinf(), w, w.clamp(-largest, largest)).to(dtype)
    return rounded.masked_fill(w.isnan(), float("nan"))


def window_mask(candidates: Tensor, capacity: int, step: int) -> Tensor:
    """The candidates that are sent: all if they fit, else ``capacity`` of them, cyclically from one that moves on at each step."""
    total = int(candidates.sum())
    if total <= capacity:
        return candidates
    rank = candidates.cumsum(0) - 1
    return candidates & ((rank - step * capacity % total) % total < capacity)


def first_of_block(candidates: Tensor, layout: GradientLayout) -> Tensor:
    """The candidates that their block's count can express: the first ``layout.max_count`` of each block."""
    if layout.max_count == layout.block:
        return candidates
    rows = torch.nn.functional.pad(candidates, (0, -candidates.numel() % layout.block)).view(-1, layout.block)
    return (rows & (rows.cumsum(1) <= layout.max_count)).view(-1)[: candidates.numel()]


def _pack_piece(w: Tensor, kept: Tensor, piece: Piece, base: int, layout: GradientLayout, chunk_payload: Tensor) -> tuple[Tensor, Tensor]:
    """Write one piece's kept entries from slot ``base`` on; returns their places in the piece and the values as written."""
    values, counts, indices = chunk_views(chunk_payload, layout)
    places = kept.nonzero().view(-1)
    sent = round_to_wire(w[places], layout.value_dtype)
    values[base : base + places.numel()] = sent
    indices[base : base + places.numel()] = (places % layout.block).to(indices.dtype)
    in_block = torch.bincount(places // layout.block, minlength=piece.blocks)
    counts[piece.first_block : piece.first_block + piece.blocks] = in_block.to(counts.dtype)
    return places, sent


@torch.no_grad()
def threshold_pack_reference(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    error_feedback: bool,
) -> Tensor:
    """Hard threshold with error feedback ([Gupta21] Alg. 1) into a payload of fixed size: uint8 [layout.payload_bytes].

    ``grad`` [numel] float32, bfloat16 or float16; ``residual`` [state_numel] float32, mutated; ``threshold`` [S] float32; ``counters``
    [S, 4] int64 (see ``layout.COUNTERS``), mutated. With W = grad + residual (grad alone without error feedback) an element is a
    candidate if abs(W) >= threshold and W != 0. Candidates beyond what a block can count or a piece can hold are not sent but stay in
    the residual; which ones a full piece sends moves on with the step, so that each has its turn. After the call, for float32 W,
    ``float(sent) + residual == W`` exactly.

    If an element of the compressed segments is not finite the step is *held*: only such elements are sent, as they are, and residual
    and step stay. An infinite W of finite summands is sent as it is (if it is sent) and its residual stays.
    """
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    payload = grad.new_zeros(layout.payload_bytes, dtype=torch.uint8)
    held = not all(bool(grad[piece.grad_offset : piece.grad_offset + piece.numel].isfinite().all()) for piece in layout.pieces)
    steps = counters[:, 0].tolist()
    kept_now = [0] * len(layout.segments)
    overflow_now = [0] * len(layout.segments)
    bases = [0] * layout.payload_chunks
    for piece in layout.pieces:
        w = grad[piece.grad_offset : piece.grad_offset + piece.numel].float()
        state = residual.data[piece.state_offset : piece.state_offset + piece.numel]
        if held:
            candidates = ~w.isfinite()
        else:
            w = w + state if error_feedback else w
            candidates = (w.abs() >= threshold[piece.segment]) & (w != 0)
        kept = window_mask(first_of_block(candidates, layout), piece.capacity, steps[piece.segment])
        start = piece.chunk * layout.chunk_bytes
        base = bases[piece.chunk]
        places, sent = _pack_piece(w, kept, piece, base, layout, payload[start : start + layout.chunk_bytes])
        bases[piece.chunk] += places.numel()
        kept_now[piece.segment] += places.numel()
        overflow_now[piece.segment] += int(candidates.sum()) - places.numel()
        if error_feedback and not held:
            rest = w.index_put((places,), w[places] - sent.float())
            state.copy_(torch.where(w.isinf(), state, rest))
    if held:
        counters.data[:, 3] = 0
    else:
        counters.data[:, 0] += 1
        counters.data[:, 1] += counters.new_tensor(kept_now)
        counters.data[:, 2] += counters.new_tensor(overflow_now)
        counters.data[:, 3] = counters.new_tensor(overflow_now)
    return payload
