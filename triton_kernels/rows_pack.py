"""``pack_rows``: keeps the largest entries of each row and writes them as a payload of fixed size."""

import math

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import row_bytes
from dct_compile.triton_kernels.row_codec import check_row_format, check_rows, encode_rows, round_to_value

METHODS = ("exact", "laplace", "fixed")
INF_KEY = 0x7F800000
"""Bits of +inf in float32. The *key* of an entry is the bits of its magnitude: integers in the same order as the magnitudes."""


def check_pack_arguments(x: Tensor, slots: int, method: str, density: float, fixed: float, value_dtype: torch.dtype) -> None:
    """Raises ValueError for arguments that mean nothing."""
    check_rows(x)
    check_row_format(x.shape[-1], slots, value_dtype)
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {METHODS}")
    if method == "laplace" and not 0 < density <= 1:
        raise ValueError(f"density {density} is outside (0, 1]")
    if method == "fixed" and not fixed >= 0:
        raise ValueError(f"fixed threshold {fixed} is negative or NaN")


def laplace_factor(density: float) -> float:
    """``-ln(density)``: what mean|x| is multiplied by to find the threshold of a zero-mean Laplace distribution; 0 keeps everything."""
    return -math.log(density) if density < 1 else 0.0


def pack_rows_reference(x: Tensor, slots: int, method: str, density: float, fixed: float, value_dtype: torch.dtype) -> Tensor:
    """Keeps at most ``slots`` entries of each row ([Gupta21], DCT-MP).

    ``x``: float32, bfloat16 or float16 [R, *row_shape], any strides; a row is its last dimension. Returns uint8
    [R, inner * row_bytes], inner = the rows in one leading index. Nothing is mutated.

    Eligible is what is not zero and at least the row's threshold: 0 for "exact"; ``-mean|x| * ln(density)`` for "laplace";
    ``fixed`` for "fixed". NaN and Inf are always eligible, with magnitude +inf. Kept are the ``slots`` eligible entries of largest
    magnitude, of equals the first. Values are rounded as in ``round_to_value``. Raises ValueError for arguments that mean nothing.
    """
    check_pack_arguments(x, slots, method, density, fixed, value_dtype)
    width = x.shape[-1]
    rows = x.reshape(-1, width).float()
    magnitude = torch.where(rows.isfinite(), rows.abs(), math.inf)
    tau = torch.zeros(rows.shape[0], 1, device=x.device)
    if method == "laplace" and density < 1:
        tau = (magnitude.double().sum(dim=1, keepdim=True) / width).float() * torch.tensor(laplace_factor(density), device=x.device)
    elif method == "fixed":
        tau = tau + fixed
    eligible = (magnitude > 0) & ((magnitude >= tau) | magnitude.isinf())
    by_magnitude = torch.where(eligible, magnitude, 0).argsort(dim=1, descending=True, stable=True)[:, :slots]
    places, _ = torch.where(eligible.gather(1, by_magnitude), by_magnitude, width).sort(dim=1)
    kept = places < width
    indices = torch.where(kept, places, 0)
    values = torch.where(kept, rows.gather(1, indices), 0)
    payload = encode_rows(round_to_value(values, value_dtype), indices, width)
    return payload.reshape(x.shape[0], math.prod(x.shape[1:-1]) * row_bytes(width, slots, value_dtype))
