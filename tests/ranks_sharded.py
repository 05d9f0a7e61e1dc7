"""Models that are sharded over ranks, and their training, for tests that several ranks run."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module

import dct_compile
from dct_compile.backend import dct

EXACT = {"dp_density": 1, "mp_density": 1, "parameter_codec": "dense", "sharded_gradients": "dense"}


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 64), nn.LayerNorm(16), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Outcome(NamedTuple):
    """``before``: the parameters, whole, before the first call. ``forward``: after a forward. ``after``: after the training."""

    before: dict[str, Tensor]
    forward: dict[str, Tensor]
    after: dict[str, Tensor]
    notes: tuple[str, ...]
    sites: list[tuple[str, str]]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of every parameter, all shards together."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in model.named_parameters()
    }


def batch(replica: int, step: int) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + replica))


def tensor_parallel(mesh: DeviceMesh, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return parallelize_module(Perceptron(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def sequence_parallel(mesh: DeviceMesh, seed: int = 0) -> nn.Module:
    """Tensor parallel, but each rank normalises a part of the rows: the gradient of a norm is a partial sum."""
    torch.manual_seed(seed)
    rows = Shard(0)
    plan = {"norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=rows), "down": RowwiseParallel()}
    model = parallelize_module(Perceptron(), mesh, plan)
    return parallelize_module(model, mesh, PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=rows))


def fsdp(mesh: DeviceMesh, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = Perceptron()
    fully_shard(model, mesh=mesh)
    return model


def replicated(mesh: DeviceMesh, seed: int = 0) -> nn.Module:
    """Copies on all ranks as DTensors: with inputs that are sharded over the batch, DTensor sums the gradients itself."""
    torch.manual_seed(seed)
    return distribute_module(Perceptron(), mesh)


class Localised(nn.Module):
    """Copies on all ranks as DTensors, each of which computes with its own tensors: nobody sums the gradients."""

    def __init__(self, mesh: DeviceMesh, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(DTensor.from_local(torch.randn(16, 16), mesh, [Replicate()], run_check=False))

    def forward(self, x: Tensor) -> Tensor:
        local = self.weight.to_local()
        return torch.relu(x @ local)


MODELS: dict[str, Callable[[DeviceMesh, int], nn.Module]] = {
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "fsdp": fsdp,
    "replicated": replicated,
    "localised": Localised,
}
DENSITIES = {"replicated": 0.05}
"""Other than 1, where no gradient is to be averaged."""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Returns an optimizer of the parameters. FSDP has others while a forward is under way, and after it."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(optimizer: torch.optim.Optimizer, compiled: Callable[[Tensor], Tensor], make: Callable[[int], Tensor]) -> None:
    for step in range(3):
        compiled(make(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(rank: int, world_size: int, name: str, averaged: bool, same: bool) -> Outcome:
    """Trains on one mesh of all ranks. ``same``: whether the ranks have one batch and one seed."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = MODELS[name](mesh, 0 if same else rank)
    compiled = torch.compile(model, backend=dct, options={**EXACT, "dp_density": DENSITIES.get(name, 1), "data_parallel": averaged})
    before, optimizer = whole(model), sgd(model)

    def make(step: int) -> Tensor:
        local = batch(0 if same else rank, step)
        return DTensor.from_local(local, mesh, [Shard(0)]) if name == "replicated" else local

    compiled(make(0))
    forward = whole(model)
    train(optimizer, compiled, make)
    report = dct_compile.report()
    return Outcome(before, forward, whole(model), report.notes, [(site.kind, site.name) for site in report.sites])


def two_dimensions(rank: int, world_size: int, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """Trains 2 replicas of a model that 2 ranks share; returns the parameters, those of training by hand, and the notes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica = mesh["dp"].get_local_rank()
    model = MODELS[name](mesh["tp"], replica)
    options = {**EXACT, "data_parallel": mesh["dp"].get_group()}
    train(sgd(model), torch.compile(model, backend=dct, options=options), lambda step: batch(replica, step))
    torch.manual_seed(0)
    reference = Perceptron()
    train(sgd(reference), reference, lambda step: torch.cat([batch(0, step), batch(1, step)]))
    return whole(model), whole(reference), dct_compile.report().notes


def mixed_up(rank: int, world_size: int) -> str:
    """Averages over all ranks, although only half of them hold copies; returns the error."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(mesh["tp"])
    try:
        torch.compile(model, backend=dct, options={"data_parallel": True})(batch(0, 0))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return repr(error.inner_exception)
    return "no error"


def crosswise(rank: int, world_size: int) -> str:
    """Averages over ranks of two meshes that hold different shards; returns the error."""
    # The groups of a mesh come first: DTensor caches their names, which must be those of the earlier meshes of this process.
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    pairs = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])]
    model = tensor_parallel(mesh["tp"])
    try:
        torch.compile(model, backend=dct, options={"data_parallel": pairs[rank in (1, 2)]})(batch(0, 0))
    except RuntimeError as error:
        return str(error)
    return "no error"
