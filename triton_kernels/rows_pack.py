"""``pack_rows``: keeps the largest entries of each row and writes them as a payload of fixed size."""

import math

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import RowLayout
from dct_compile.triton_kernels.row_codec import encode_rows, round_to_value

METHODS = ("exact", "laplace", "fixed")
INF_KEY = 0x7F800000
"""Bits of +inf in float32. The *key* of an entry is the bits of its magnitude: integers in the same order as the magnitudes."""


def laplace_factor(density: float) -> float:
    """``-ln(density)``: what mean|x| is multiplied by to find the threshold of a zero-mean Laplace distribution; 0 keeps everything."""
    return -math.log(density) if density < 1 else 0.0


def pack_rows_reference(x: Tensor, layout: RowLayout, method: str, density: float, fixed: float) -> Tensor:
    """Keeps at most ``layout.capacity`` entries of each row ([Gupta21], DCT-MP).

    ``x``: float32, bfloat16 or float16 [R, *layout.row_shape], any strides; a row is its last dimension. Returns uint8
    [R, layout.inner * layout.row_bytes]. Nothing is mutated.

    Eligible is what is not zero and at least the row's threshold: 0 for "exact"; ``-mean|x| * ln(density)`` for "laplace";
    ``fixed`` for "fixed". NaN and Inf are always eligible, with magnitude +inf. Kept are the ``capacity`` eligible entries of largest
    magnitude, of equals the first. Values are rounded as in ``round_to_value``.
    """
    width = layout.width
    rows = x.reshape(-1, width).float()
    magnitude = torch.where(rows.isfinite(), rows.abs(), math.inf)
    tau = torch.zeros(rows.shape[0], 1, device=x.device)
    if method == "laplace" and density < 1:
        tau = (magnitude.double().sum(dim=1, keepdim=True) / width).float() * torch.tensor(laplace_factor(density), device=x.device)
    elif method == "fixed":
        tau = tau + fixed
    eligible = (magnitude > 0) & ((magnitude >= tau) | magnitude.isinf())
    by_magnitude = torch.where(eligible, magnitude, 0).argsort(dim=1, descending=True, stable=True)[:, : layout.capacity]
    ascending, _ = torch.where(eligible.gather(1, by_magnitude), by_magnitude, width).sort(dim=1)
    kept = ascending < width
    indices = torch.where(kept, ascending, 0)
    values = torch.where(kept, rows.gather(1, indices), 0)
    payload = encode_rows(round_to_value(values, layout.value_dtype), indices, layout)
    return payload.reshape(x.shape[0], layout.inner * layout.row_bytes)
