"""`threshold_pack` on the device: one pass marks candidates and writes the residual, a second touches only the candidates.

Between the two the number of candidates decides, on the device, what each piece sends and where. Nothing spins, nothing is read on the
host, and integers alone decide the order: the bytes are the same in every run.
"""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, tl
from dct_compile.triton_kernels.gradient_checks import check_state
from dct_compile.triton_kernels.gradient_tables import block_table, is_nonfinite, nonfinite_flag, piece_table
from dct_compile.triton_kernels.layout import GradientLayout, gradient_layout


@jit
def scan_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel]
    residual_ptr,  # float32 [state_numel]
    threshold_ptr,  # float32 [S]
    held_ptr,  # int32 [1]
    blocks_ptr,  # int64 [blocks, 4]
    pieces_ptr,  # int64 [pieces, 6]
    bits_ptr,  # int32 [blocks, BLOCK / 32]: out, one bit for each candidate
    found_ptr,  # int32 [blocks]: out, the number of candidates
    BLOCK: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """W of a block: marks the candidates; of the others W is the new residual."""
    block = tl.program_id(0).to(tl.int64)
    grad_start = tl.load(blocks_ptr + block * 4)
    state_start = tl.load(blocks_ptr + block * 4 + 1)
    size = tl.load(blocks_ptr + block * 4 + 2)
    piece = tl.load(blocks_ptr + block * 4 + 3)
    tau = tl.load(threshold_ptr + tl.load(pieces_ptr + piece * 6))
    held = tl.load(held_ptr)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < size
    grad = tl.load(grad_ptr + grad_start + offsets, mask=inside, other=0.0).to(tl.float32)
    w = grad
    if FEEDBACK:
        w += tl.load(residual_ptr + state_start + offsets, mask=inside, other=0.0)
    reaching = (tl.abs(w) >= tau) & (w != 0.0)
    candidate = tl.where(held != 0, is_nonfinite(grad).to(tl.int32), reaching.to(tl.int32)) * inside.to(tl.int32)
    if FEEDBACK:
        tl.store(residual_ptr + state_start + offsets, w, mask=inside & (candidate + held == 0))
    words = tl.reshape(candidate, [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :]
    tl.store(bits_ptr + block * (BLOCK // 32) + tl.arange(0, BLOCK // 32), tl.sum(words, axis=1))
    tl.store(found_ptr + block, tl.sum(candidate, axis=0))


@jit
def write_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [numel]
    residual_ptr,  # float32 [state_numel]
    held_ptr,  # int32 [1]
    blocks_ptr,  # int64 [blocks, 4]
    pieces_ptr,  # int64 [pieces, 6]
    windows_ptr,  # int64 [pieces, 4]: entries, start of the window, its size, first slot
    bits_ptr,  # int32 [blocks, BLOCK / 32]
    base_ptr,  # int64 [blocks]: rank of the block's first entry in its piece
    values_ptr,  # the payload as int32 (float32 values) or int16
    places_ptr,  # the payload as uint8 or int16
    CHUNK_BYTES: tl.constexpr,
    COUNTS_OFFSET: tl.constexpr,
    INDICES_OFFSET: tl.constexpr,
    INDEX_BYTES: tl.constexpr,
    MAX_COUNT: tl.constexpr,
    VALUE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    FEEDBACK: tl.constexpr,
):
    """The candidates of a block: those inside their piece's window go to the payload, their rest and the others to the residual."""
    block = tl.program_id(0).to(tl.int64)
    grad_start = tl.load(blocks_ptr + block * 4)
    state_start = tl.load(blocks_ptr + block * 4 + 1)
    piece = tl.load(blocks_ptr + block * 4 + 3)
    chunk = tl.load(pieces_ptr + piece * 6 + 1)
    chunk_block = tl.load(pieces_ptr + piece * 6 + 3) + block - tl.load(pieces_ptr + piece * 6 + 4)
    entries = tl.load(windows_ptr + piece * 4)
    start = tl.load(windows_ptr + piece * 4 + 1)
    capacity = tl.load(windows_ptr + piece * 4 + 2)
    first_slot = tl.load(windows_ptr + piece * 4 + 3)
    base = tl.load(base_ptr + block)
    held = tl.load(held_ptr)
    # Which candidates are kept, and in which slots.
    offsets = tl.arange(0, BLOCK)
    words = tl.load(bits_ptr + block * (BLOCK // 32) + offsets // 32)
    candidate = (words >> (offsets % 32)) & 1
    in_block = tl.cumsum(candidate, axis=0) - 1
    distance = base + in_block - start
    distance = tl.where(distance < 0, distance + entries, distance)
    kept = (candidate != 0) & (in_block < MAX_COUNT) & (distance < capacity)
    wrapped = tl.maximum(start + capacity - entries, 0)
    kept_before = tl.minimum(base, wrapped) + tl.minimum(tl.maximum(base - start, 0), capacity - wrapped)
    slot = first_slot + kept_before + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    # W again: the first pass left the residual of candidates as it was.
    grad = tl.load(grad_ptr + grad_start + offsets, mask=candidate != 0, other=0.0).to(tl.float32)
    w = grad
    if FEEDBACK:
        state = tl.load(residual_ptr + state_start + offsets, mask=candidate != 0, other=0.0)
        w = tl.where(held != 0, grad, grad + state)
    # Rounded on its bits, so that every machine writes the same NaN.
    raw = w.to(tl.int32, bitcast=True)
    nan = (raw & 0x7FFFFFFF) > 0x7F800000
    finite = (raw & 0x7F800000) != 0x7F800000
    clamped = tl.where(finite, tl.minimum(tl.maximum(w, -LARGEST), LARGEST), w)
    raw = clamped.to(tl.int32, bitcast=True)
    if VALUE == "float32":
        code = tl.where(nan, 0x7FC00000, raw)
        sent = w
        tl.store(values_ptr + chunk * (CHUNK_BYTES // 4) + slot, code, mask=kept)
    else:
        if VALUE == "bfloat16":
            code = tl.where(nan, 0x7FC0, (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16)
            sent = (code << 16).to(tl.float32, bitcast=True)
        else:
            half = clamped.to(tl.float16)
            code = tl.where(nan, 0x7E00, half.to(tl.int16, bitcast=True).to(tl.int32))
            sent = half.to(tl.float32)
        tl.store(values_ptr + chunk * (CHUNK_BYTES // 2) + slot, code.to(tl.int16), mask=kept)
    places = places_ptr + chunk * (CHUNK_BYTES // INDEX_BYTES)
    tl.store(places + INDICES_OFFSET // INDEX_BYTES + slot, offsets.to(places_ptr.dtype.element_ty), mask=kept)
    count = tl.sum(kept.to(tl.int32), axis=0)
    tl.store(places + COUNTS_OFFSET // INDEX_BYTES + chunk_block, count.to(places_ptr.dtype.element_ty))
    if FEEDBACK:
        rest = tl.where(kept, w - sent, w)
        tl.store(residual_ptr + state_start + offsets, rest, mask=(candidate - held > 0) & finite)


def _windows(found: Tensor, counters: Tensor, held: Tensor, layout: GradientLayout) -> tuple[Tensor, Tensor]:
    """From the candidates of each block: the windows and bases for `write_kernel`. Updates the counters. Nothing leaves the device."""
    segment, _, capacity, _, table_block, blocks = piece_table(layout, found.device).unbind(1)
    parameters = len(layout.segments)
    entries_before = torch.nn.functional.pad(found.clamp(max=layout.max_count).long().cumsum(0), (1, 0))
    found_before = torch.nn.functional.pad(found.long().cumsum(0), (1, 0))
    entries = entries_before[table_block + blocks] - entries_before[table_block]
    kept = torch.minimum(entries, capacity)
    start = torch.where(entries > capacity, counters[segment, 0] * capacity % entries.clamp(min=1), 0)
    kept_by_chunk = kept.view(layout.payload_chunks, parameters)
    slot = (kept_by_chunk.cumsum(1) - kept_by_chunk).view(-1)
    piece_of_block = block_table(layout, found.device)[:, 3]
    base = entries_before[:-1] - entries_before[table_block[piece_of_block]]

    live = 1 - held.long()
    overflow = found_before[table_block + blocks] - found_before[table_block] - kept
    overflow_now = overflow.view(-1, parameters).sum(0) * live
    counters.data[:, 0] += live
    counters.data[:, 1] += kept_by_chunk.sum(0) * live
    counters.data[:, 2] += overflow_now
    counters.data[:, 3] = overflow_now
    return torch.stack([entries, start, kept, slot], dim=1), base


@torch.no_grad()
def threshold_pack_triton(
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
    """`threshold_pack_reference` in two passes: the second touches only candidates. No host sync; the same bytes in every run."""
    layout = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype)
    check_state(grad, residual, threshold, counters, layout, error_feedback)
    payload = grad.new_zeros(layout.payload_bytes, dtype=torch.uint8)
    grad = grad.contiguous()
    blocks = block_table(layout, grad.device)
    pieces = piece_table(layout, grad.device)
    if not layout.segments:
        return payload
    held = nonfinite_flag(grad, layout, wanted=grad.new_ones(1, dtype=torch.int32))
    bits = torch.empty(blocks.shape[0], block // 32, dtype=torch.int32, device=grad.device)
    found = torch.empty(blocks.shape[0], dtype=torch.int32, device=grad.device)
    grid = (blocks.shape[0],)
    if blocks.shape[0]:
        scan_kernel[grid](grad, residual, threshold, held, blocks, pieces, bits, found, BLOCK=block, FEEDBACK=error_feedback)
    windows, base = _windows(found, counters, held, layout)
    if blocks.shape[0]:
        write_kernel[grid](
            grad,
            residual,
            held,
            blocks,
            pieces,
            windows,
            bits,
            base,
            payload.view(torch.int32 if value_dtype == torch.float32 else torch.int16),
            payload if layout.index_bytes == 1 else payload.view(torch.int16),
            CHUNK_BYTES=layout.chunk_bytes,
            COUNTS_OFFSET=layout.counts_offset,
            INDICES_OFFSET=layout.indices_offset,
            INDEX_BYTES=layout.index_bytes,
            MAX_COUNT=layout.max_count,
            VALUE=str(value_dtype).removeprefix("torch."),
            LARGEST=torch.finfo(value_dtype).max,
            BLOCK=block,
            FEEDBACK=error_feedback,
        )
    return payload
