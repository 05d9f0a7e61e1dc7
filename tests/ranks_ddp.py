"""A small model under DDP and its training, for tests that several ranks run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.ranks import digest
from tests.ranks_audit import Auditor

Options = dict[str, Any]
SMALL_BUCKETS = 0.004
"""MB: a bucket for nearly every layer of ``Net``. Dynamo's own splitting at buckets must be off for less than 1 MB."""


class Net(nn.Module):
    """Two branches, one of which may be left out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.middle, self.top = nn.Linear(16, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 8)
        self.side = nn.Linear(16, width)

    def forward(self, x: Tensor, use_side: bool = True) -> Tensor:
        h = self.middle(torch.relu(self.bottom(x)))
        if use_side:
            h = h + self.side(x)
        return self.top(torch.relu(h))


class Exchanging(nn.Module):
    """Two linear layers with an exchange in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.top = nn.Linear(16, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(funcol.all_to_all_single_autograd(torch.relu(self.bottom(x)), None, None, dist.group.WORLD))


class Part(nn.Module):
    """One linear layer with code of its own: Dynamo compiles no frame of torch's, such as that of a bare linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def train(
    module: nn.Module,
    compiled: Callable[..., Tensor],
    rank: int,
    steps: range,
    auditor: Auditor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    arguments: Callable[[int], tuple[Any, ...]] = lambda step: (),
) -> list[str]:
    """Trains, and returns one digest of all parameters per step."""
    optimizer = optimizer or torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    dtype = next(module.parameters()).dtype
    digests = []
    for step in steps:
        if auditor is not None:
            auditor.begin()
        loss_of(compiled(batch(rank, step, dtype), *arguments(step))).backward()
        if auditor is not None:
            auditor.end()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(module.parameters()))
    return digests


@dataclass(frozen=True)
class Outcome:
    """``digests``: of the parameters at every step. ``decisions``: (decision, reason) of every gradient. ``state``: names in the state."""

    digests: list[str]
    decisions: list[tuple[str, str]]
    state: list[str]


def outcome(module: nn.Module, digests: list[str]) -> Outcome:
    decisions = [(site.decision, site.reason) for site in dct_compile.report().sites if site.kind == "gradient"]
    return Outcome(digests, decisions, sorted(dct_compile.state_dict(module)))


def ddp_of(model: nn.Module, options: Options, inside: bool, **settings: Any) -> tuple[DistributedDataParallel, Any]:
    """Returns the DDP module and the callable: compiled inside of DDP or around it."""
    if inside:
        module = DistributedDataParallel(torch.compile(model, backend=dct, options=options), **settings)
        return module, module
    module = DistributedDataParallel(model, **settings)
    return module, torch.compile(module, backend=dct, options=options)
