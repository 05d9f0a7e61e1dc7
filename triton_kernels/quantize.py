"""``quantize_rows`` and ``dequantize_rows``: the codec of embedding exchanges, row-scaled integers with stochastic rounding.

One row of a payload (``quantized_row_bytes`` of layout.py)::

    scale  bfloat16, little-endian
    codes  8 bits: [width] int8
           4 bits: [ceil(width / 2)] bytes of two, two's complement, the low half first; a last high half without an entry is 0
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import quantized_row_bytes

SMALLEST_SCALE = 2.0**-126
"""A row that is not all zero has at least this scale (the smallest normal float32), so that its reciprocal is accurate and finite."""


def largest_code(bits: int) -> int:
    """Returns 127 or 7: the codes are symmetric around 0. Raises ValueError for other ``bits`` than 8 and 4."""
    if bits not in (8, 4):
        raise ValueError(f"bits {bits} is not 8 or 4")
    return 127 if bits == 8 else 7


def _mix(h: Tensor) -> Tensor:
    """Mixes 32-bit integers (held in int64) by a bijection whose every result bit depends on all bits: hash-prospector's lowbias32."""
    h = h ^ h >> 16
    h = h * 0x7FEB352D & 0xFFFFFFFF
    h = h ^ h >> 15
    h = h * 0x846CA68B & 0xFFFFFFFF
    return h ^ h >> 16


SHARED = 32
"""Of so many neighbouring entries of a row the first 16 share their 32 random bits with the other 16: 16 bits for each."""


def uniform(seed: Tensor, row: Tensor, column: Tensor, width: int) -> Tensor:
    """Returns float32 in (-0.5, 0.5) for the entries at ``row`` and ``column`` (int64) of rows of ``width``, with 16 random bits for each.

    The same on any device for one ``seed`` (int64 [1]).
    """
    number = (row * -(-width // SHARED) + column // SHARED) * (SHARED // 2) + column % (SHARED // 2)
    key = _mix(seed & 0xFFFFFFFF ^ _mix(seed >> 32 & 0xFFFFFFFF ^ _mix(number >> 32)))
    mixed = _mix(number & 0xFFFFFFFF ^ key)
    half = torch.where(column % SHARED < SHARED // 2, mixed & 0xFFFF, mixed >> 16)
    return ((half ^ 0x8000) * 2 - 0xFFFF).float() * 2.0**-17


def quantize_rows_reference(x: Tensor, seed: Tensor, bits: int) -> Tensor:
    """Encodes each row as one scale and a code of ``bits`` bits for each entry. Nothing is mutated.

    scale = max|x| / qmax, rounded up to bfloat16; code = round(x * (1 / scale) + u) with u uniform in (-0.5, 0.5): but for the rounding of
    the product the expectation of code * scale is x, and no entry moves by more than one scale. A row of zeros has scale 0; a row with
    NaN or Inf has scale NaN and decodes to NaN.

    Args:
        x: float32, bfloat16 or float16 [R, *row_shape], any strides; a row is its last dimension.
        seed: int64 [1] on the same device, read there.
        bits: 8 or 4.

    Returns:
        uint8 [R, inner * quantized_row_bytes].
    """
    qmax = largest_code(bits)
    width = x.shape[-1]
    rows = x.reshape(-1, width).float()
    amax = rows.abs().amax(dim=1, keepdim=True)
    # By a tensor: CUDA divides by a Python number by multiplying with its reciprocal, which rounds differently.
    scale = amax / torch.full_like(amax, qmax)
    # A positive float32 is rounded up to bfloat16 by adding just less than one unit of the kept half to its bits.
    up = (scale.clamp(min=SMALLEST_SCALE).view(torch.int32) + 0xFFFF) & -0x10000
    scale = torch.where(amax > 0, up.view(torch.float32), 0).masked_fill(~amax.isfinite(), math.nan)
    row, column = torch.arange(rows.shape[0], device=x.device)[:, None], torch.arange(width, device=x.device)
    codes = (rows * scale.reciprocal() + uniform(seed, row, column, width)).round().clamp(-qmax, qmax)
    codes = torch.where(scale > 0, codes, 0).to(torch.int64)
    if bits == 4:
        codes = torch.nn.functional.pad(codes & 15, (0, width % 2))
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    scale_bits = scale.bfloat16().masked_fill(scale.isnan(), math.nan).view(torch.uint8)
    payload = torch.cat([scale_bits, (codes & 255).to(torch.uint8)], dim=1)
    return payload.reshape(x.shape[0], math.prod(x.shape[1:-1]) * quantized_row_bytes(width, bits))


def dequantize_rows_reference(payload: Tensor, row_shape: Sequence[int], bits: int, dtype: torch.dtype) -> Tensor:
    """Decodes the rows of ``quantize_rows``: code * scale.

    The scale is rounded up, so the largest code may stand for more than the row's largest entry. A value beyond the range of ``dtype``
    becomes its largest finite value.

    Args:
        payload: uint8 [R, inner * quantized_row_bytes].
        row_shape: The sizes of a result behind the leading dimension.
        bits: 8 or 4.
        dtype: The dtype of the result.

    Returns:
        ``dtype`` [R, *row_shape], contiguous.
    """
    width = row_shape[-1]
    rows = payload.reshape(-1, quantized_row_bytes(width, bits))
    scale = rows[:, :2].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    codes = rows[:, 2:].int()
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)[:, :width]
    half = 1 << (bits - 1)
    codes = (codes ^ half) - half
    largest = torch.finfo(dtype).max
    return (codes.float() * scale).clamp(-largest, largest).to(dtype).reshape(payload.shape[0], *row_shape)
