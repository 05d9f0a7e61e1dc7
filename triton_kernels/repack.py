"""What an owner does with its share of everybody's gradient: sum the payloads, choose a threshold for the sum, pack it again."""

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import gradient_layout
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference


@torch.no_grad()
def repack_reference(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    segments: list[int],
    block: int,
    chunks: int,
    chunk: int,
    capacity_fraction: float,
    value_dtype: torch.dtype,
    density: float,
    method: str,
    fixed: float,
    refresh_interval: int,
    refresh_warmup: str,
    error_feedback: bool,
) -> Tensor:
    """The payload of the sum of payloads: uint8 [layout.chunk_bytes].

    ``gathered``: uint8 [P * layout.chunk_bytes], one chunk of every rank, as in `unpack_accumulate_reference` with ``chunk >= 0``; the
    sum is not divided. ``residual``, ``threshold`` and ``counters`` are those of the owner, and mutated as by `select_threshold_reference`
    and `threshold_pack_reference`, which say what the other arguments mean.
    """
    geometry, wire = (segments, block, chunks, chunk), (capacity_fraction, value_dtype)
    numel = gradient_layout(tuple(segments), block, chunks, chunk, capacity_fraction, value_dtype).state_numel
    total = unpack_accumulate_reference(gathered, None, numel, torch.float32, *geometry, *wire, 1)
    state = (total, residual, threshold, counters, *geometry)
    select_threshold_reference(*state, density, method, fixed, refresh_interval, refresh_warmup, error_feedback)
    return threshold_pack_reference(*state, *wire, error_feedback)
