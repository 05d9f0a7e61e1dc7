"""Layers of the same code and their batches, for tests that several ranks run."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """The same code for every layer, so that Dynamo compiles it once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def stack(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), Block())


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))
