"""A pipeline: each rank holds a stage. Hidden states and their gradients travel as int8 rows, once all stages have agreed (step 3).

torchrun --nproc-per-node 2 examples/pipeline.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import TOKENS, LanguageModel, batches, run
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F


class Stage(nn.Module):
    """A block; the first stage embeds the tokens, the last one returns logits."""

    def __init__(self, whole: LanguageModel, stage: int, stages: int) -> None:
        super().__init__()
        self.embedding = nn.ModuleList([whole.tokens, whole.places]) if stage == 0 else None
        self.block = whole.blocks[stage]
        self.head = nn.Sequential(whole.norm, whole.head) if stage == stages - 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding[0](x) + self.embedding[1].weight[: x.shape[1]]
        result: Tensor = self.head(self.block(x))
        return result


def loss_of(logits: Tensor, following: Tensor) -> Tensor:
    """Returns the mean cross entropy of logits [batch, length, TOKENS]."""
    return F.cross_entropy(logits.view(-1, TOKENS), following.flatten())


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the stage."""
    torch.manual_seed(seed)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = torch.compile(Stage(LanguageModel(ranks), rank, ranks), backend="dct", options=options)
    schedule = Schedule1F1B(PipelineStage(model, rank, ranks, torch.device("cpu")), n_microbatches=4, loss_fn=loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps + 1)
    last = torch.zeros(())
    for step, tokens in enumerate(batches(seed, steps)):
        losses: list[Tensor] = []
        schedule.step(*[tokens[:, :-1]] * (rank == 0), target=tokens[:, 1:], losses=losses)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if losses and step >= steps - max(1, steps // 10):
            last += torch.stack(losses).mean().detach()
    dist.all_reduce(last)  # only the last stage has a loss
    return last.item() / max(1, steps // 10), model


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
