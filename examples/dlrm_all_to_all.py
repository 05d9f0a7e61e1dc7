"""A DLRM as facebookresearch/dlrm writes it: tables on some ranks, an asynchronous all_to_all in autograd functions, DDP for the MLPs.

`torchrun --nproc-per-node 2 examples/dlrm_all_to_all.py`. The trial assumes the link of two hosts; leave `link` out there.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile

DENSE, TABLES, ROWS, DIM, BATCH = 8, 4, 500, 32, 128
dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
rank, ranks = dist.get_rank(), dist.get_world_size()
shares = [len(range(TABLES)[r::ranks]) * BATCH * DIM for r in range(ranks)]  # elements that rank r sends to each rank
pending: list[tuple[dist.Work, Tensor]] = []


class Start(torch.autograd.Function):
    """Starts the exchange of pooled vectors [ranks * BATCH, own tables * DIM]. Its backward ends that of their gradients."""

    @staticmethod
    def forward(ctx, vectors: Tensor) -> Tensor:
        received, ctx.shape = vectors.new_empty(sum(shares)), vectors.shape
        own = [shares[rank]] * ranks
        pending.append((dct_compile.all_to_all_single(received, vectors.reshape(-1), shares, own, async_op=True, width=DIM), received))
        return received

    @staticmethod
    def backward(ctx, _: Tensor) -> Tensor:
        work, gradient = pending.pop()
        work.wait()
        return gradient.view(ctx.shape)


class Finish(torch.autograd.Function):
    """Ends the exchange of vectors. Its backward starts that of their gradients."""

    @staticmethod
    def forward(ctx, received: Tensor) -> Tensor:
        pending.pop()[0].wait()
        return torch.cat([share.view(BATCH, -1) for share in received.split(shares)], dim=1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        sent = torch.cat([part.reshape(-1) for part in gradient.split([share // BATCH for share in shares], dim=1)])
        returned, own = sent.new_empty(ranks * shares[rank]), [shares[rank]] * ranks
        pending.append((dct_compile.all_to_all_single(returned, sent, own, shares, async_op=True, width=DIM), returned))
        return sent  # stands for the gradient that is under way


class Net(nn.Module):
    """Own tables, and the MLPs that all ranks share."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(ROWS, DIM, mode="sum") for _ in range(TABLES)[rank::ranks])
        self.bottom = DistributedDataParallel(nn.Sequential(nn.Linear(DENSE, 256), nn.ReLU(), nn.Linear(256, DIM), nn.ReLU()))
        top = nn.Sequential(nn.Linear((TABLES + 1) * DIM, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))
        self.top = DistributedDataParallel(top)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Logits [BATCH] of ``dense`` [BATCH, DENSE] of this rank and ``ids`` [own tables, ranks * BATCH, 1] of all ranks."""
        started = Start.apply(torch.cat([table(item) for table, item in zip(self.tables, ids, strict=True)], dim=1))
        bottom = self.bottom(dense)
        return self.top(torch.cat([bottom, Finish.apply(started)], dim=1)).squeeze(1)


model = Net()
compiled = torch.compile(model, backend="dct", options={"link": "1Gbit/s"})
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
data = torch.Generator().manual_seed(1)
taste = torch.randn(TABLES, ROWS, generator=data)
for step in range(201):
    dense, ids = torch.randn(ranks * BATCH, DENSE, generator=data), torch.randint(ROWS, (TABLES, ranks * BATCH, 1), generator=data)
    score = dense.sum(1) / 2 + taste.gather(1, ids.squeeze(2)).sum(0)
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    loss = nn.functional.binary_cross_entropy_with_logits(compiled(dense[own], ids[rank::ranks]), (score[own] > 0).float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 and rank == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")
if rank == 0:
    print(dct_compile.report())
dist.destroy_process_group()
