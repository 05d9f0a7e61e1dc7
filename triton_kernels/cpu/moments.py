"""The compiled CPU version of ``prepare_moments``, with the signature of the reference."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import DTYPE_CODES, INT, POINTER, cpu_function
from dct_compile.triton_kernels.moments import each_of, is_flat, prepare_one

_PREPARE = (POINTER, INT, POINTER, POINTER, INT, INT)


def prepare_moments_cpu(
    scalars: Tensor,
    shares: Tensor | None,
    grads: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
) -> None:
    """Computes `prepare_moments_reference`, compiled: gradients are read once, and what does not arrive is not looked at."""
    table = array("q")  # of moments.cpp: struct Moments
    for moments in each_of(grads, parameters, first, second, last):
        if scalars.dtype != torch.float32 or not is_flat(moments):
            prepare_one(scalars, shares, moments)
            continue
        table.extend([0 if held is None else held.data_ptr() for held in moments])
        table.extend((moments.grad.numel(), DTYPE_CODES[moments.grad.dtype]))
    start, numbers = table.buffer_info()
    by_gap, gaps = (None, 0) if shares is None else (shares.data_ptr(), shares.shape[0])
    if numbers:
        arguments = (start, numbers // 7, scalars.data_ptr(), by_gap, gaps, torch.get_num_threads())
        cpu_function("dct_prepare_moments", _PREPARE)(*arguments)
