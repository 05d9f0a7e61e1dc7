"""A tiny model, in each of the ways in which the backend takes part in its training."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {"dp_density": 0.05, "link": None}
WAYS = ("compile(DDP)", "DDP(compile)", "data_parallel", "activations", "arrival=late")
GRADIENTS = tuple(way for way in WAYS if way != "activations")
"""The ways that average gradients."""


class Net(nn.Module):
    """Two layers; ``exchanging`` puts an all_to_all between them, ``broken`` a graph break."""

    def __init__(self, exchanging: bool = False, broken: bool = False, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.top = nn.Linear(16, width), nn.Linear(width, width)
        self.exchanging, self.broken = exchanging, broken

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bottom(x))
        if self.exchanging:
            assert dist.group.WORLD is not None
            h = funcol.all_to_all_single_autograd(h, None, None, dist.group.WORLD)
        if self.broken:
            torch._dynamo.graph_break()
        y: Tensor = self.top(h)
        return y


class Training:
    """A training of :class:`Net` in one of ``WAYS``.

    ``options``: added to ``OPTIONS``. ``settings``: of the Net. ``group``: the process group, all ranks by default.
    """

    def __init__(self, way: str, options: dict[str, Any] | None = None, group: dist.ProcessGroup | None = None, **settings: Any) -> None:
        own = {**OPTIONS, **(options or {})}
        self.model: nn.Module = Net(exchanging=way == "activations", **settings)
        if way == "data_parallel":
            own["data_parallel"] = group if group is not None else True
        if way == "arrival=late":
            own["arrival"] = "late"
        if way == "DDP(compile)":
            self.model = DistributedDataParallel(torch.compile(self.model, backend="dct", options=own), process_group=group)
            self.compiled: Callable[..., Tensor] = self.model
        else:
            if way in ("compile(DDP)", "arrival=late"):
                self.model = DistributedDataParallel(self.model, process_group=group)
            self.compiled = torch.compile(self.model, backend="dct", options=own)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def loss(self, x: Tensor) -> Tensor:
        return self.compiled(x).square().sum() / 512

    def apply(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, rank: int, numbers: range) -> None:
        for number in numbers:
            self.loss(batch(rank, number)).backward()
            self.apply()

    def digest(self) -> str:
        """Returns the sha256 of all parameters' bytes."""
        total = hashlib.sha256()
        for parameter in self.model.parameters():
            total.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def batch(rank: int, step: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
