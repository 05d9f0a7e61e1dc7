"""``prepare_moments`` on the device: a launch for each parameter, one pass over its gradient."""

from __future__ import annotations  # `tl.constexpr` is not evaluated: there may be no Triton

from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import jit, launch, tl
from dct_compile.triton_kernels.moments import each_of, is_flat, prepare_one
from dct_compile.triton_kernels.number_formats_triton import (
    CODES,
    as_bits,
    as_float,
    as_stored,
    float_of_bits,
    rounded_bits,
    rounded_product,
)

_BLOCK = 1024


@jit
def prepare_moments_kernel(  # type: ignore[no-untyped-def]
    scalars_ptr,  # float32 [5]: moments.SCALARS
    shares_ptr,  # float32 [longest + 1]; where something plays no part, its pointer is not looked at
    grad_ptr,
    parameter_ptr,
    first_ptr,
    second_ptr,
    last_ptr,
    numel,
    longest,
    CODE: tl.constexpr,
    DECAYS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Prepares the elements of a block."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < tl.where(tl.load(scalars_ptr + 4) == 0.0, numel, 0)  # nothing where the step is left out
    grad = as_float(tl.load(grad_ptr + offsets, mask=inside, other=0), CODE)
    unscale = tl.load(scalars_ptr + 1)
    if DECAYS:
        parameter = as_float(tl.load(parameter_ptr + offsets, mask=inside, other=0), CODE)
        added = rounded_product(grad, unscale) + rounded_product(parameter, tl.load(scalars_ptr + 2))
    else:
        added = grad * unscale
    if FIRST:
        tl.store(first_ptr + offsets, rounded_bits(added * tl.load(scalars_ptr), CODE, False), mask=inside)
    if SECOND:
        # Where nothing arrives, neither moment nor step is read.
        arrived = inside & (grad != 0.0)
        step = tl.load(scalars_ptr + 3).to(tl.int32)
        gap = step - tl.load(last_ptr + offsets, mask=arrived, other=0)
        gap = tl.minimum(tl.maximum(gap, 1), longest).to(tl.int32)
        share = tl.load(shares_ptr + gap, mask=arrived, other=0.0)
        second = float_of_bits(tl.load(second_ptr + offsets, mask=arrived, other=0).to(tl.int32), CODE)
        second = second + rounded_product(share, added * added)
        tl.store(second_ptr + offsets, rounded_bits(second, CODE, False), mask=arrived)
        tl.store(last_ptr + offsets, step, mask=arrived)


@torch.no_grad()
def prepare_moments_triton(
    scalars: Tensor,
    shares: Tensor | None,
    grads: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
) -> None:
    """Computes `prepare_moments_reference` with Triton. No host sync."""
    for moments in each_of(grads, parameters, first, second, last):
        if scalars.dtype != torch.float32 or not is_flat(moments):
            prepare_one(scalars, shares, moments)
        elif numel := moments.grad.numel():
            grad = as_stored(moments.grad)
            launch(prepare_moments_kernel, (-(-numel // _BLOCK),))(
                scalars,
                scalars if shares is None else shares,
                grad,
                grad if moments.parameter is None else as_stored(moments.parameter),
                grad if moments.first is None else as_bits(moments.first),
                grad if moments.second is None else as_bits(moments.second),
                grad if moments.last is None else moments.last,
                numel,
                0 if shares is None else shares.shape[0] - 1,
                CODE=CODES[moments.grad.dtype],
                DECAYS=moments.parameter is not None,
                FIRST=moments.first is not None,
                SECOND=moments.second is not None,
                BLOCK=_BLOCK,
            )
