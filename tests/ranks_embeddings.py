"""Exchanges of embeddings outside of graphs, for tests that several ranks run: a DLRM's autograd functions, and their reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from dct_compile.triton_kernels.quantize import dequantize_rows_reference, quantize_rows_reference

AllToAll = Callable[..., dist.Work | None]
DIM = 16


def coded(x: Tensor, width: int, bits: int = 8, number: int = 0) -> Tensor:
    """Returns ``x`` as it arrives: by the reference of the codec, with the seed that the data themselves are."""
    rows = x.reshape(-1, width)
    seed = rows.view(torch.int32 if rows.itemsize == 4 else torch.int16).sum() + number
    codes = quantize_rows_reference(rows, seed.reshape([1]), bits)
    return dequantize_rows_reference(codes, [width], bits, x.dtype).reshape(x.shape)


def normal(seed: int, *shape: int) -> Tensor:
    """Returns random numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Exchange(torch.autograd.Function):
    """An asynchronous exchange of rows, forward and backward, as a model of one's own writes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, all_to_all: AllToAll, outgoing: Sequence[int], incoming: Sequence[int]) -> Tensor:
        ctx.call, ctx.splits = all_to_all, (outgoing, incoming)
        y = x.new_empty(sum(incoming), *x.shape[1:])
        work = all_to_all(y, x, list(incoming), list(outgoing), async_op=True)
        assert work is not None
        work.wait()
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        outgoing, incoming = ctx.splits
        dx = dy.new_empty(sum(outgoing), *dy.shape[1:])
        work = ctx.call(dx, dy.contiguous(), list(outgoing), list(incoming), async_op=True)
        work.wait()
        return dx, None, None, None


class Recommender(nn.Module):
    """One table for each rank, exchanged so that each rank has the vectors of its own samples."""

    def __init__(self, all_to_all: AllToAll, rank: int, ranks: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.all_to_all, self.ranks = all_to_all, ranks
        self.table = nn.Embedding(50, DIM)
        torch.manual_seed(0)
        self.top = nn.Linear(ranks * DIM, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` int64 [ranks * B] of all samples -> logits [B] of this rank's."""
        share = [len(ids) // self.ranks] * self.ranks
        vectors = Exchange.apply(self.table(ids), self.all_to_all, share, share)
        return self.top(torch.cat(vectors.chunk(self.ranks), dim=1)).squeeze(1)


ENCODED: AllToAll = dct_compile.all_to_all_single
DENSE: AllToAll = dist.all_to_all_single
