"""``prepare_moments``: changes the moments of an optimizer before its step, as `dct_compile.optim` explains.

The geometry of a parameter plays no part, only its elements do. Numbers that differ from step to step are one tensor on the device of the
parameters, so that no host waits for those that are computed there.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout_checks import ROW_DTYPES

SCALARS = ("factor", "unscale", "decay", "step", "skipped")
"""The numbers of one call, in the order of ``scalars``.

``factor``: of the gradient in the first moment. ``unscale``: 1 over the scale of the loss, negative where the optimizer maximizes.
``decay``: the weight decay that the optimizer adds to the gradient. ``step``: the number of the step to come, from 1 on. ``skipped``: not 0
where a fused optimizer leaves this step out, because a gradient is not finite: nothing is changed then.
"""
_LARGEST_GAP = 1 << 20


class Moments(NamedTuple):
    """One parameter: its gradient, and of the same shape what plays a part."""

    grad: Tensor
    parameter: Tensor | None
    first: Tensor | None
    second: Tensor | None
    last: Tensor | None


def each_of(*lists: Sequence[Tensor]) -> Iterator[Moments]:
    """Gives the parameters of lists in the order of `Moments`, of which all but the first may be empty."""
    return map(Moments._make, zip(*(held or repeat(None) for held in lists), strict=False))


def is_flat(moments: Moments) -> bool:
    """Says whether a kernel can go through the memory of all tensors in order: one dtype that it knows, and the same strides, dense."""
    dtype = moments.grad.dtype
    if dtype not in ROW_DTYPES or any(held is not None and held.dtype != dtype for held in moments[1:4]):
        return False
    tensors = [held for held in moments if held is not None]
    if all(held.is_contiguous() for held in tensors):
        return True
    dense = torch.empty_like(moments.grad, device="meta").stride()  # other strides are not preserved
    return all(held.stride() == dense for held in tensors)


@lru_cache(maxsize=64)
def spread_shares(beta2: float, eps: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the share of the square of an element that a second moment gets before the step, by the steps that the element has waited.

    The step makes ``beta2 * v + (1 - beta2) * g^2`` of the moment ``v``. With the share ``((1 - beta2^gap) / gap - (1 - beta2)) / beta2``
    it gives the square the weight ``(1 - beta2^gap) / gap``. A longer gap than the table knows counts as its longest. That is
    ``1024 / (1 - beta2)`` steps, less in number formats that are so coarse that the moment could become negative, and at most 2^20.

    Args:
        beta2: What the moment keeps of itself in a step, between 0 and 1.
        eps: The relative distance of neighbouring numbers of the moment.
        dtype: Of the result: float32 or float64.
        device: Of the result.

    Returns:
        ``dtype`` [longest gap + 1]; the first entry is never looked at.
    """
    longest = min(math.ceil(min(1024.0, 1 / (4 * eps)) / (1 - beta2)), _LARGEST_GAP)
    gap = torch.arange(1, longest + 1, dtype=torch.float64)
    shares = (-torch.expm1(gap * math.log(beta2)) / gap - (1 - beta2)) / beta2
    shares[0] = 0
    return torch.cat([shares.new_zeros(1), shares]).to(device, dtype)


def check_prepare_moments(
    scalars: Tensor,
    shares: Tensor | None,
    grads: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
) -> None:
    """Raises ValueError, naming the tensor, for arguments that `prepare_moments` does not take."""
    device = scalars.device
    if scalars.dtype not in (torch.float32, torch.float64) or scalars.shape != (len(SCALARS),) or not scalars.is_contiguous():
        raise ValueError(f"scalars is {scalars.dtype} {list(scalars.shape)}: expected contiguous float32 or float64 [{len(SCALARS)}]")
    if shares is not None and (
        shares.dtype != scalars.dtype or shares.device != device or shares.dim() != 1 or shares.shape[0] < 2 or not shares.is_contiguous()
    ):
        found = f"{shares.dtype} {list(shares.shape)} on {shares.device}"
        raise ValueError(f"shares is {found}: expected contiguous {scalars.dtype} [2 or more] on {device}")
    if len(last) != len(second) or (second and shares is None):
        given = "no shares" if shares is None else "shares"
        raise ValueError(
            f"second has {len(second)} tensors, last {len(last)}, and there are {given}: expected one last for each, and shares"
        )
    shapes = [grad.shape for grad in grads]
    for name, held in (("grads", grads), ("parameters", parameters), ("first", first), ("second", second), ("last", last)):
        if held and len(held) != len(grads):
            raise ValueError(f"{name} has {len(held)} tensors: expected none, or {len(grads)} as grads")
        for index, tensor in enumerate(held):
            fits = tensor.dtype == torch.int32 if held is last else tensor.is_floating_point()
            if not fits or tensor.shape != shapes[index] or tensor.device != device:
                found, kind = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}", "int32" if held is last else "floating point"
                raise ValueError(f"{name}[{index}] is {found}: expected {kind} {list(shapes[index])} on {device}")


@torch.no_grad()
def prepare_one(scalars: Tensor, shares: Tensor | None, moments: Moments) -> None:
    """Does for one parameter as `prepare_moments_reference` says."""
    factor, unscale, decay, step, skipped = scalars.unbind()
    grad, parameter, first, second, last = moments
    added = grad.to(scalars.dtype) * unscale
    if parameter is not None:
        added = added + parameter.to(scalars.dtype) * decay
    applied = skipped == 0
    if first is not None:
        first.data.copy_(torch.where(applied, added * factor, first))
    if second is not None and last is not None and shares is not None:
        now = step.to(torch.int32)
        share = shares[(now - last).clamp(1, shares.shape[0] - 1)]
        arrived = applied & (grad != 0)
        spread = second.to(scalars.dtype) + share * added.square()
        second.data.copy_(torch.where(arrived, spread, second))
        last.data.copy_(torch.where(arrived, now, last))


def prepare_moments_reference(
    scalars: Tensor,
    shares: Tensor | None,
    grads: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
) -> None:
    """Sets first moments, and spreads the squares of elements that arrive over the steps that they have waited.

    For each element, with the numbers of `SCALARS`: ``added = grad * unscale + parameter * decay`` is what the optimizer takes as gradient.
    ``first`` becomes ``factor * added``. Where the gradient is not zero, ``shares[step - last] * added^2`` is added to ``second``, and
    ``last`` becomes ``step``; a gap outside of ``shares`` counts as its first, 1, or its longest. All is computed in the dtype of
    ``scalars``, each operation rounded, and rounded once to the dtype of a moment.

    Args:
        scalars: float32 or float64 [5], read on its device.
        shares: What `spread_shares` returns; ``None`` without ``second``.
        grads: Gradients, floating point, of any shapes and strides.
        parameters: The parameters, of the same shapes; empty where no weight decay is added.
        first: First moments, mutated; empty where none are to be set.
        second: Second moments, mutated; empty where nothing is to be spread.
        last: int32, the step at which each element arrived last, mutated; as many as ``second``.
    """
    for moments in each_of(grads, parameters, first, second, last):
        prepare_one(scalars, shares, moments)
