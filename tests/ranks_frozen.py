"""Models under ``fully_shard`` of which a part is frozen, at first or later, for tests that several ranks run."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import dct_compile
from dct_compile.report import SiteReport

WIDTH = 64
EXACT: dict[str, Any] = {"parameter_codec": "dense", "sharded_gradients": "dense", "dp_value_dtype": "float32"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Two(nn.Module):
    """Two layers of the same size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def train_only(model: Two, *names: str) -> None:
    """Freezes all layers but those of ``names``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in names)


def two_sharded(mesh: DeviceMesh, *trained: str, groups: int = 2) -> Two:
    """Returns a model of which the layers ``trained`` are trained. ``groups``: whether each layer has a parameter group of its own (2)."""
    model = Two()
    train_only(model, *trained)
    for layer in (model.first, model.second) if groups == 2 else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def input_of(rank: int, step: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def rows(kind: str) -> list[SiteReport]:
    return [site for site in dct_compile.report().sites if site.kind == kind]
