"""Context parallelism: each rank holds a part of the sequence, and gathers keys and values, which travel as int8 rows.

torchrun --nproc-per-node 2 examples/context_parallel.py
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from language import HEADS, LENGTH, TOKENS, WIDTH, Attention, LanguageModel, fit, run
from torch import Tensor, nn
from torch.nn import functional as F


class GatheredAttention(Attention):
    """Attention of this rank's queries to the keys and values of all ranks."""

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        start, ranks = dist.get_rank() * length, dist.get_world_size()
        both = torch.cat([self.k(x), self.v(x)], dim=-1).transpose(0, 1).contiguous()  # the sequence is gathered along the first dimension
        everyone = funcol.all_gather_tensor_autograd(both, 0, dist.group.WORLD).transpose(0, 1)
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q(x), everyone[..., :WIDTH], everyone[..., WIDTH:])
        )
        sees = torch.arange(ranks * length) <= torch.arange(start, start + length).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=sees)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class SplitModel(LanguageModel):
    """The loss of this rank's part of the sequence."""

    def forward(self, tokens: Tensor) -> Tensor:
        own = LENGTH // dist.get_world_size()
        start = dist.get_rank() * own
        x = self.tokens(tokens[:, start : start + own]) + self.places.weight[start : start + own]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, TOKENS), tokens[:, start + 1 : start + own + 1].flatten())


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = SplitModel()
    for block in model.blocks:
        block.attention = GatheredAttention()
    compiled = torch.compile(model, backend="dct", options={"data_parallel": True, **options})
    return fit(compiled, seed, steps)


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
