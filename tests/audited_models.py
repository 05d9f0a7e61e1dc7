"""Models of trainings that are audited. All map [rows, 16] to the same shape."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Two layers whose gradients are compressed, and a bias that stays dense."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Tied(nn.Module):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Mixed(nn.Module):
    """bfloat16 beside float32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 48, dtype=torch.bfloat16), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x.bfloat16())).float())


class ChannelsLast(nn.Module):
    """A convolution whose weight lies in memory in another order than its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 16, 3, padding=1).to(memory_format=torch.channels_last)
        self.d = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(x.view(-1, 4, 2, 2)).mean((2, 3)))


class Checkpointed(Net):
    """The first layer is computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda y: torch.relu(self.a(y)), x, use_reentrant=False))


class Critic(nn.Module):
    """A model class of one's own around torch's modules, which Dynamo would skip."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)
