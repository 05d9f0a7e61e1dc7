"""Contrastive learning: each rank compares its pairs with the features of all ranks, which are gathered as int8 rows.

torchrun --nproc-per-node 2 examples/contrastive.py
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from language import TOKENS, WIDTH, fit, own_rows, run
from torch import Tensor, nn
from torch.nn import functional as F


class Pairs(nn.Module):
    """Tells which second half of a sequence belongs to which first half."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.first, self.second = (nn.Sequential(nn.Linear(16 * WIDTH, 256), nn.ReLU(), nn.Linear(256, WIDTH)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = self.tokens(tokens[:, :32]).flatten(1).chunk(2, dim=1)
        queries, keys = F.normalize(self.first(first)), F.normalize(self.second(second))
        everyone = funcol.all_gather_tensor_autograd(keys, 0, dist.group.WORLD)
        own = torch.arange(len(queries)) + dist.get_rank() * len(queries)
        return F.cross_entropy(queries @ everyone.T / 0.1, own)


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = Pairs()
    compiled = torch.compile(model, backend="dct", options={"data_parallel": True, **options})
    return fit(compiled, seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
