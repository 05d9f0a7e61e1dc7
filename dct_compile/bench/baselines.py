"""The baselines of the ops: the same work as chains of ordinary PyTorch ops.

A chain reads the tensors that its op reads; where that is a payload, it reads the entries as PyTorch would hold them: values and int64
indices. Nothing is mutated, and values are left in bfloat16, as they would be sent.
"""

import math

import torch
from torch import Tensor

from dct_compile.triton_kernels.select_threshold import SAMPLE_GROUP


def kthvalue_threshold(grad: Tensor, residual: Tensor, rank: int, stride: int) -> Tensor:
    """Returns the ``rank``-th largest abs(grad + residual) of every ``stride``-th group, all of which are whole."""
    magnitude = _magnitude(grad, residual, stride)
    return magnitude.kthvalue(magnitude.numel() - rank + 1).values


def sort_threshold(grad: Tensor, residual: Tensor, rank: int, stride: int) -> Tensor:
    """Returns the same from sorted magnitudes."""
    return _magnitude(grad, residual, stride).sort(descending=True).values[rank - 1]


def topk_threshold(grad: Tensor, residual: Tensor, rank: int, stride: int) -> Tensor:
    """Returns the same as the least of the largest."""
    return _magnitude(grad, residual, stride).topk(rank, sorted=False).values.min()


def _magnitude(grad: Tensor, residual: Tensor, stride: int) -> Tensor:
    grad, residual = (x.unfold(0, SAMPLE_GROUP, SAMPLE_GROUP * stride) for x in (grad, residual))
    return (grad + residual).abs().flatten()


def laplace_threshold(grad: Tensor, residual: Tensor, density: float) -> Tensor:
    """Returns the threshold of a Laplace distribution."""
    return (grad + residual).abs().mean() * -math.log(density)


def threshold_chain(grad: Tensor, residual: Tensor, threshold: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns indices, values and residual of the entries that reach the threshold."""
    w = grad + residual
    kept = w.abs() >= threshold
    indices = kept.nonzero().view(-1)
    return indices, w[indices].to(torch.bfloat16), w.masked_fill(kept, 0.0)


def topk_compression(grad: Tensor, residual: Tensor, threshold: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns indices, values and residual of the ``rank`` largest entries."""
    w = grad + residual
    indices = w.abs().topk(rank, sorted=False).indices
    return indices, w[indices].to(torch.bfloat16), w.index_fill(0, indices, 0.0)


def index_add(numel: int, dtype: torch.dtype, *entries: Tensor) -> Tensor:
    """Returns the mean of payloads; ``entries``: indices and values of each."""
    total = torch.zeros(numel, device=entries[0].device)
    for indices, values in zip(entries[::2], entries[1::2], strict=True):
        total.index_add_(0, indices, values.float())
    return (total / (len(entries) // 2)).to(dtype)


def index_add_chain(residual: Tensor, threshold: Tensor, *entries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum of payloads, and what `threshold_chain` makes of it."""
    total = torch.zeros_like(residual)
    for indices, values in zip(entries[::2], entries[1::2], strict=True):
        total.index_add_(0, indices, values.float())
    return threshold_chain(total, residual, threshold, 0)


def topk_rows(x: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Returns indices and values of the ``capacity`` largest entries of each row."""
    indices = x.abs().topk(capacity, dim=-1, sorted=False).indices
    return indices, x.gather(-1, indices).to(torch.bfloat16)


def scatter_dense(width: int, dtype: torch.dtype, indices: Tensor, values: Tensor) -> Tensor:
    """Dense rows of ``width`` with the values at their indices."""
    return torch.zeros(indices.shape[0], width, dtype=dtype, device=indices.device).scatter_(-1, indices, values.to(dtype))


def gather_values(grad: Tensor, indices: Tensor) -> Tensor:
    """Returns the entries of each row at the indices."""
    return grad.gather(-1, indices).to(torch.bfloat16)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and stochastically rounded codes of each row; two codes of 4 bits in a byte."""
    largest = 127 if bits == 8 else 7
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    codes = (x / scale + torch.rand_like(x, dtype=torch.float32)).floor().clamp(-largest, largest).to(torch.int8)
    if bits == 4:
        codes = codes[:, ::2] & 15 | codes[:, 1::2] << 4
    return scale.to(torch.bfloat16), codes


def dequantise(scale: Tensor, codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Code times scale."""
    if bits == 4:
        codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=-1).flatten(-2)
    return (codes.float() * scale.float()).to(dtype)
