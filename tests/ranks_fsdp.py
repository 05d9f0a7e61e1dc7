"""Models under ``fully_shard`` and their training, for tests that several ranks run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import dct_compile
from dct_compile.backend import dct
from dct_compile.report import SiteReport

Options = dict[str, Any]
OPTIONS: dict[str, Options | None] = {
    "none": None,
    "dense": {"parameter_codec": "dense", "sharded_gradients": "dense"},
    "default": {},
    "gradients": {"parameter_codec": "dense"},
    **{f"parameters {codec}": {"parameter_codec": codec, "sharded_gradients": "dense"} for codec in ("int8", "int4", "bfloat16")},
}
"""Options by name; with "none" the model is not compiled."""
UNEVEN = 7
"""Rows of a weight that neither 2 nor 3 ranks share evenly."""


class Net(nn.Module):
    """Two blocks, and a head whose rows are not even; ``frozen`` is never trained."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, UNEVEN)
        self.frozen = nn.Parameter(torch.randn(32, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x + (x @ self.frozen.T @ self.frozen) / 100)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


SHARDING: dict[str, Options] = {
    "plain": {},
    "kept": {"reshard_after_forward": False},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "bfloat16 sums": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "float16 sums": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float16)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}
"""The ways to call ``fully_shard``."""


def sharded(mesh: DeviceMesh, way: str = "plain") -> Net:
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **SHARDING[way])
    fully_shard(model, mesh=mesh, **SHARDING[way])
    return model


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(output: Tensor) -> Tensor:
    return (output.float() - torch.arange(UNEVEN)).square().mean()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of all tensors, all shards together."""
    return {name: (item.full_tensor() if isinstance(item, DTensor) else item).detach().clone() for name, item in tensors.items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return whole(dict(model.named_parameters()))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return whole({name: item.grad for name, item in model.named_parameters() if item.grad is not None})


@dataclass
class Outcome:
    """``losses``: one per step. ``gradients``: of the first step that was compressed. ``parameters``: at the end."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    sites: tuple[SiteReport, ...] = ()
    notes: tuple[str, ...] = ()


def compiled_of(model: nn.Module, options: str) -> Callable[..., Any]:
    """Returns ``model`` compiled with the options of that name."""
    chosen = OPTIONS[options]
    return model if chosen is None else torch.compile(model, backend=dct, options=chosen)


def trained(rank: int, world_size: int, way: str, options: str, steps: int = 3, optimizer: str = "SGD") -> Outcome:
    model = sharded(init_device_mesh("cpu", (world_size,)), way)
    compiled, outcome = compiled_of(model, options), Outcome()
    with torch.no_grad():
        compiled(batch(rank, 99))
    made = {"SGD": torch.optim.SGD(model.parameters(), lr=0.02), "Adam": torch.optim.Adam(model.parameters(), lr=0.01)}[optimizer]
    for step in range(steps):
        loss = loss_of(compiled(batch(rank, step)))
        loss.backward()
        outcome.losses.append(float(loss))
        if step == 0:
            outcome.gradients = gradients(model)
        made.step()
        made.zero_grad()
    outcome.parameters = parameters(model)
    report = dct_compile.report()
    outcome.sites, outcome.notes = report.sites, report.notes
    return outcome


def mean_gradients(world_size: int) -> dict[str, Tensor]:
    """Returns the mean over the ranks of the gradients of the first step, without any wrapper."""
    model = Net()
    losses = [loss_of(model(batch(rank, 0))) for rank in range(world_size)]
    (sum(losses) / world_size).backward()  # type: ignore[union-attr]
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def gathered_values(rank: int, world_size: int, codec: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters as this rank computes with them, and the exact ones."""
    model = sharded(init_device_mesh("cpu", (world_size,)), "kept")
    compiled = compiled_of(model, f"parameters {codec}")
    compiled(batch(rank, 0))
    model.reshard()
    for block in model.blocks:
        block.reshard()
    exact = parameters(model)
    compiled(batch(rank, 0))
    for module in (model, *model.blocks):
        module.unshard()
    return whole(dict(model.named_parameters())), exact


def is_same_everywhere(tensors: dict[str, Tensor]) -> bool:
    """Returns whether all ranks hold the same values, bit for bit."""
    flat = torch.cat([item.flatten().float() for item in tensors.values()])
    found = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(found, flat)
    return all(torch.equal(item.view(torch.int32), flat.view(torch.int32)) for item in found)
