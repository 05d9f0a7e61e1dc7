"""What the examples share: a small language model in plain PyTorch, tokens to learn from, and a training loop."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dct_compile

TOKENS, WIDTH, HEADS, BLOCKS, LENGTH, BATCH = 16, 64, 4, 2, 32, 16


class Attention(nn.Module):
    """Causal attention. The number of heads follows from the columns that ``qkv`` has on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.gelu(self.up(x)))
        return result


class Block(nn.Module):
    """Attention and a feed-forward part, each on a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.forward_norm, self.feed_forward = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        result: Tensor = x + self.feed_forward(self.forward_norm(x))
        return result


class LanguageModel(nn.Module):
    """Returns the mean cross entropy of the next tokens of ``tokens`` int64 [batch, length + 1]."""

    def __init__(self, blocks: int | None = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks or BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens[:, :-1]) + self.places.weight[: tokens.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def batches(seed: int, steps: int) -> Iterator[Tensor]:
    """Yields int64 [BATCH, LENGTH + 1]: each token follows from the two before it, and one in ten is drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, TOKENS, (BATCH, LENGTH + 1), generator=generator)
        noise = torch.rand(BATCH, LENGTH + 1, generator=generator) < 0.1
        for place in range(2, LENGTH + 1):
            follows = (5 * tokens[:, place - 1] + tokens[:, place - 2] + 7) % TOKENS
            tokens[:, place] = torch.where(noise[:, place], tokens[:, place], follows)
        yield tokens


def own_rows() -> slice:
    """Returns the rows of a batch that this rank sees, where each sees its own."""
    rows = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)


def fit(model: nn.Module, seed: int, steps: int, rows: slice = slice(None)) -> tuple[float, nn.Module]:
    """Trains on ``rows`` of each batch; returns the loss of the last tenth of the steps, the mean over the ranks, and the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps + 1)
    last = torch.zeros(())
    for step, tokens in enumerate(batches(seed, steps)):
        loss = model(tokens[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last += loss.detach() * (step >= steps - max(1, steps // 10))
    dist.all_reduce(last)
    return last.item() / max(1, steps // 10) / dist.get_world_size(), model


def run(train: Callable[..., tuple[float, nn.Module]], options: dict[str, Any]) -> None:
    """Trains on the ranks that torchrun has started, and prints the report and the loss."""
    dist.init_process_group()
    loss, _ = train(options)
    if dist.get_rank() == 0:
        print(f"{dct_compile.report()}\nloss {loss:.3f}")
    dist.destroy_process_group()
