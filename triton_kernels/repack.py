"""The owner's step on its share of the gradients of all ranks: sum the payloads, choose a threshold for the sum, pack it again."""

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import GradientLayout, Selection
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference


@torch.no_grad()
def repack_reference(
    gathered: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> Tensor:
    """Returns the payload of the sum of payloads: uint8 [layout.chunk_bytes].

    ``gathered``: uint8 [P * layout.chunk_bytes], one chunk of every rank, as in `unpack_accumulate_reference` with ``chunk >= 0``; the
    sum is not divided. ``residual``, ``threshold`` and ``counters`` are those of the owner, and mutated as by `select_threshold_reference`
    and `threshold_pack_reference`, which say what the other arguments mean.
    """
    total = unpack_accumulate_reference(gathered, None, layout.state_numel, torch.float32, layout, 1)
    select_threshold_reference(total, residual, threshold, counters, layout, selection, error_feedback)
    return threshold_pack_reference(total, residual, threshold, counters, layout, error_feedback)
