"""Sums of rows over ranks, each rank with those of its own samples: partial sums travel as codes, and their gradients.

::

    own   = reduce_scatter(partial)     codes    = encode(partial of other ranks' samples)
                                  ==>   received = all_to_all_single(codes)               asynchronous
                                        own      = partial of own samples + decode(received).sum()        in float32

    grads = all_gather(grad)            codes    = encode(grad)
                                  ==>   gathered = all_gather_into_tensor(codes)          asynchronous
                                        grads    = decode(gathered), but for the own, which is exact

This is the first step of "quantized_sum". Outside of graphs an autograd function starts an exchange, and another one ends it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from dct_compile.embeddings.codec import RowCodec


@dataclass(frozen=True)
class RowCodecs:
    """``forward``: of the partial sums. ``backward``: of their gradients. Both have rows of one width."""

    forward: RowCodec
    backward: RowCodec


class RowSum:
    """A sum that is under way; ``wait`` ends it. Autograd goes through it.

    Args:
        partial: This rank's addends for the samples of all ranks, any shape; the rows of rank 0 come first.
        splits: Sizes of the shares of the ranks, along the first dimension; equal on all ranks.
        group: The ranks.
        codecs: The codecs.
        divided: Whether gradients are divided by the number of ranks.
    """

    def __init__(self, partial: Tensor, splits: Sequence[int], group: dist.ProcessGroup, codecs: RowCodecs, divided: bool) -> None:
        self.group, self.codecs, self.divided = group, codecs, divided
        self.shape, self.dtype, self.rank = partial.shape, partial.dtype, group.rank()
        self.sizes = [split * prod(partial.shape[1:]) for split in splits]
        self.work: dist.Work | None = None
        self._token = _Start.apply(partial, self)  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """Returns the sum for this rank's samples, with the dtype of the addends. Is called once."""
        token = self._token
        del self._token  # its history holds this object
        summed: Tensor = _Finish.apply(token, self)  # type: ignore[no-untyped-call]
        return summed

    def start(self, partial: Tensor) -> None:
        """Sends the codes of the addends to the ranks whose samples they are for."""
        codec, parts = self.codecs.forward, list(partial.reshape(-1).split(self.sizes))
        self.own = parts.pop(self.rank)
        self.sent = codec.encode(torch.cat(parts))
        outgoing = [codec.size(size) for size in self.sizes]
        incoming = [outgoing[self.rank]] * len(self.sizes)
        outgoing[self.rank] = incoming[self.rank] = 0
        self.received = self.sent.new_empty(sum(incoming))
        self.work = dist.all_to_all_single(self.received, self.sent, incoming, outgoing, group=self.group, async_op=True)

    def finish(self) -> Tensor:
        """Adds up what the other ranks have sent."""
        self._end()
        addends = self.codecs.forward.decode(self.received, torch.float32).view(len(self.sizes) - 1, -1)
        summed = addends.sum(0).add_(self.own).to(self.dtype)
        del self.own, self.sent, self.received
        return summed.view(-1, *self.shape[1:])

    def start_back(self, grad: Tensor) -> None:
        """Sends the codes of the gradient of this rank's samples to all ranks. Shorter ones are filled up to the length of the longest."""
        codec, self.own = self.codecs.backward, grad.reshape(-1)
        codes = codec.encode(self.own)
        self.sent = pad(codes, (0, codec.size(max(self.sizes)) - codes.numel()))
        self.received = codes.new_empty([len(self.sizes), self.sent.numel()])
        self.work = dist.all_gather_into_tensor(self.received.view(-1), self.sent, group=self.group, async_op=True)

    def finish_back(self) -> Tensor:
        """Returns the gradient of the addends."""
        self._end()
        codec = self.codecs.backward
        codes = torch.cat([row[: codec.size(size)] for row, size in zip(self.received, self.sizes, strict=True)])
        grads = codec.decode(codes, self.dtype)
        grads.split(self.sizes)[self.rank].copy_(self.own)
        del self.own, self.sent, self.received
        return (grads.div_(len(self.sizes)) if self.divided else grads).view(self.shape)

    def _end(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work = None


class _Start(torch.autograd.Function):
    """Starts the exchange; its backward ends the one of the gradient."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, under_way: RowSum) -> Tensor:
        ctx.under_way = under_way
        under_way.start(partial)
        return partial.new_zeros(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return ctx.under_way.finish_back(), None


class _Finish(torch.autograd.Function):
    """Ends the exchange; its backward starts the one of the gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, under_way: RowSum) -> Tensor:
        ctx.under_way = under_way
        return under_way.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.under_way.start_back(grad)
        return grad.new_zeros(1, dtype=torch.float32), None
