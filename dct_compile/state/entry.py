"""The saved state of one parameter on one rank: plain tensors by name, independent of buckets, schemes and memory formats.

::

    residual     float32 [numel]   row-major, whatever the parameter's memory format
    counters     int64 [5]         or [4], from a version that did not count what the last step kept
    threshold    float32 []        and other tensors that a scheme keeps
    late         float32 [numel]   row-major: the mean that joins the next gradient, where gradients arrive late
    owner        the same three of the share of the sum that the rank owns
    owner_share  [block, chunks, chunk, unit]: which share that is of the elements as they lie in the buffer. Older states have no unit:
                 their shares are runs of whole blocks
    owner_order  [shape, dims]: that order, where it is not row-major
    density      float             that the threshold was chosen for, where there is one
    exchanges    int               of the parameter's gradient so far, in a training with phases; it may be all that there is
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from dct_compile.element_order import ElementOrder
from dct_compile.state.spec import LATE
from dct_compile.triton_kernels.layout import COUNTERS, TILE
from dct_compile.triton_kernels.shares import place_of, share_numel

Entry = dict[str, Any]
EARLIER_COUNTERS = 4
"""Columns of the counters that an earlier version saved: the first ones of today's."""
NUMBER = "exchanges"
"""The key of the number of exchanges."""
_OWNER = ("owner", "owner_share", "owner_order")


def copy_of(entry: Entry, device: torch.device | None = None) -> Entry:
    """Returns a copy of ``entry`` that shares no tensor with it, on ``device`` or where each tensor is."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(device or value.device, copy=True)
        return {key: copy(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {key: copy(value) for key, value in entry.items()}


def with_all_counters(entry: Entry) -> Entry:
    """Returns ``entry``, without its stages, with zeros for the counters that an earlier version did not keep."""
    counters = entry.get("counters")
    if counters is None or counters.shape != (EARLIER_COUNTERS,):
        return entry
    return {**entry, "counters": torch.nn.functional.pad(counters, (0, COUNTERS - EARLIER_COUNTERS))}


def share_of(numel: int, owner_share: Sequence[int]) -> Tensor:
    """Returns which of a parameter's ``numel`` elements, as they lie in the buffer, a share holds: int64 [elements], in its order."""
    block, chunks, chunk, *unit = owner_share
    if unit:
        return place_of(torch.arange(share_numel(numel, chunks, chunk), device="cpu"), chunks, chunk)
    block = min(block, TILE)
    run = ceil(ceil(numel / block) / chunks) * block
    return torch.arange(min(chunk * run, numel), min((chunk + 1) * run, numel), device="cpu")


def fold_share(entry: Entry) -> Entry:
    """Returns ``entry`` without the owner's stage. The residual of the share is added to that of the rank itself.

    The sum over the ranks is unchanged, so nothing is lost.
    """
    if "owner" not in entry:
        return entry
    residual = entry["residual"]
    order = ElementOrder(*map(tuple, entry["owner_order"])) if "owner_order" in entry else None
    laid_out = residual.clone() if order is None else order.to_buffer(residual)
    laid_out[share_of(residual.numel(), entry["owner_share"]).to(residual.device)] += entry["owner"]["residual"].to(residual.device)
    kept = {name: value for name, value in entry.items() if name not in _OWNER}
    return {**kept, "residual": laid_out if order is None else order.to_row_major(laid_out)}


def fold_late(entry: Entry) -> Entry:
    """Returns ``entry`` without the mean that arrives late, which is added to the residual.

    Every rank has the same mean, so the sum over the ranks is unchanged where all of them do so. What is not finite is left out.
    """
    if LATE not in entry:
        return entry
    kept = {name: value for name, value in entry.items() if name != LATE}
    return {**kept, "residual": entry["residual"] + entry[LATE].nan_to_num(0.0, 0.0, 0.0).to(entry["residual"].device)}
