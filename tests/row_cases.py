"""Rows at the edges of the selection and of the number formats, and a slow oracle of what is kept."""

import math

import torch
from torch import Tensor

NAN, INF = math.nan, math.inf


def edge_rows(width: int, dtype: torch.dtype) -> Tensor:
    """[15, width]: each row is an edge of the selection or of a number format."""
    random = torch.randn(15, width, generator=torch.Generator().manual_seed(width))
    index = torch.arange(width)
    random[1] = random[1].relu()
    random[2] = (2 * random[2]).round()  # ties, at the threshold too
    random[3] = 0
    random[4] = -1.5
    random[5] = -random[5].abs()
    random[6] = torch.where(index == width - 1, 2.0, -0.0)
    random[7] = torch.where(index == 0, -3.0, 0.0)
    random[8, ::2] = NAN
    random[8, 1::3] = -INF
    random[9, width // 2] = INF
    random[10] *= 1e-40  # denormals of float32; zero or denormals in 16 bits
    random[11] *= 1e-7  # some are zero in float16, and so may be the first that is kept
    random[12] *= 1e38
    random[13] *= 1e5  # past float16
    random[14] = torch.where(index % 7 == 3, random[14], 0)
    return random.to(dtype)


def oracle(row: list[float], capacity: int, tau: float) -> list[int]:
    """The kept indices of a row, in the words of the specification."""

    def magnitude(i: int) -> float:
        return abs(row[i]) if math.isfinite(row[i]) else INF

    eligible = [i for i, x in enumerate(row) if x != 0 and (magnitude(i) >= tau or not math.isfinite(x))]
    return sorted(sorted(eligible, key=lambda i: (-magnitude(i), i))[:capacity])


def tau_of(row: Tensor, method: str, density: float, fixed: float) -> float:
    if method == "exact" or (method == "laplace" and density == 1):
        return 0.0
    if method == "fixed":
        return fixed
    mean = row.double().abs().mean()
    return float(mean.float() * torch.tensor(-math.log(density))) if mean.isfinite() else INF
