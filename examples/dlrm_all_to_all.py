"""A DLRM as facebookresearch/dlrm writes it: tables on some ranks, an asynchronous all_to_all in autograd functions, DDP for the MLPs.

`torchrun --nproc-per-node 2 examples/dlrm_all_to_all.py`. The trial assumes the link of two hosts; leave `link` out there.
"""

from typing import Any

import torch
import torch.distributed as dist
from language import run
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

import dct_compile

TABLES, ROWS, DIM, BATCH = 4, 500, 32, 128
pending: list[tuple[dist.Work, Tensor]] = []


def incoming() -> list[int]:
    """Returns the elements that each rank sends to this one: the vectors of its tables for a batch."""
    ranks = dist.get_world_size()
    return [len(range(TABLES)[sender::ranks]) * BATCH * DIM for sender in range(ranks)]


def outgoing() -> list[int]:
    """Returns the elements that this rank sends to each."""
    return [incoming()[dist.get_rank()]] * dist.get_world_size()


def start(received: Tensor, sent: Tensor, *splits: list[int]) -> None:
    """Starts an exchange. The only change: ``dct_compile`` in place of ``dist``, and the width of an embedding vector."""
    pending.append((dct_compile.all_to_all_single(received, sent, *splits, async_op=True, width=DIM), received))


class Start(torch.autograd.Function):
    """Starts the exchange of vectors [ranks * BATCH, own tables * DIM]; the backward ends that of their gradients."""

    @staticmethod
    def forward(ctx, vectors: Tensor) -> Tensor:
        received, ctx.shape = vectors.new_empty(sum(incoming())), vectors.shape
        start(received, vectors.reshape(-1), incoming(), outgoing())
        return received

    @staticmethod
    def backward(ctx, _: Tensor) -> Tensor:
        work, gradient = pending.pop()
        work.wait()
        return gradient.view(ctx.shape)


class Finish(torch.autograd.Function):
    """Ends the exchange of vectors, [BATCH, TABLES * DIM]; the backward starts that of their gradients."""

    @staticmethod
    def forward(ctx, received: Tensor) -> Tensor:
        pending.pop()[0].wait()
        return torch.cat([share.view(BATCH, -1) for share in received.split(incoming())], dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        sent = torch.cat([part.reshape(-1) for part in gradient.split([share // BATCH for share in incoming()], dim=1)])
        start(sent.new_empty(sum(outgoing())), sent, outgoing(), incoming())
        return sent  # stands for the gradient that is under way


class Net(nn.Module):
    """This rank's tables, and the MLPs that all ranks share."""

    def __init__(self) -> None:
        super().__init__()
        own = range(TABLES)[dist.get_rank() :: dist.get_world_size()]
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, DIM, mode="sum") for _ in own)
        self.bottom = DistributedDataParallel(nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, DIM), nn.ReLU()))
        top = nn.Sequential(nn.Linear((TABLES + 1) * DIM, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
        self.top = DistributedDataParallel(top)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        started = Start.apply(torch.cat([table(item) for table, item in zip(self.tables, ids, strict=True)], dim=1))
        bottom = self.bottom(dense)
        return self.top(torch.cat([bottom, Finish.apply(started)], dim=1)).squeeze(1)


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss of the last tenth of the steps, and the model. The data are random ids with a hidden score."""
    torch.manual_seed(seed)
    rank, ranks, model = dist.get_rank(), dist.get_world_size(), Net()
    compiled = torch.compile(model, backend="dct", options=options)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
    data = torch.Generator().manual_seed(seed + 1)
    taste, own = torch.randn(TABLES, ROWS, generator=data), slice(rank * BATCH, (rank + 1) * BATCH)
    last = torch.zeros(())
    for step in range(steps):
        dense, ids = torch.randn(ranks * BATCH, 8, generator=data), torch.randint(ROWS, (TABLES, ranks * BATCH, 1), generator=data)
        score = dense.sum(1) / 2 + taste.gather(1, ids.squeeze(2)).sum(0)
        loss = binary_cross_entropy_with_logits(compiled(dense[own], ids[rank::ranks]), (score[own] > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last += loss.detach() * (step >= steps - max(1, steps // 10))
    dist.all_reduce(last)
    return last.item() / max(1, steps // 10) / ranks, model


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
