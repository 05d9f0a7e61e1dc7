"""Hybrid parallelism for models in plain PyTorch: column-parallel layers, sharded embedding tables, data parallelism per parameter.

Ranks form a mesh [dp, mp]. The ``mp`` ranks of one data-parallel index see the same batch of B samples; each of them holds a part of the
*sharded* parameters (tables, column-parallel layers); what those compute is exchanged, and everything else is computed alike by all of
them. ``group`` below is the process group of those ranks; ``None`` stands for a single rank.

Scale of gradients. The loss of a batch is the mean over all dp * B samples. Each rank calls backward on the mean loss of its B samples, so
what is differentiated is mp times the loss, once per rank of the group. Then

- a *replicated* parameter has a part of that gradient on each of the mp ranks (what its own columns and samples lead back to): the average
  over all ranks is the gradient of the batch's loss;
- a *sharded* parameter has all of it, because the backward of an exchange (all_to_all, reduce_scatter) adds up what all receivers send
  back: its average over dp is mp times too large, and :func:`average_sharded_gradients` divides it by mp.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Mesh:
    """This rank's place: ``dp_group`` replicates the sharded parameters, ``mp_group`` shares one batch (``None``: not parallel)."""

    dp: int
    mp: int
    dp_rank: int
    mp_rank: int
    dp_group: dist.ProcessGroup | None
    mp_group: dist.ProcessGroup | None


def make_mesh(dp: int, mp: int) -> Mesh:
    """Returns the mesh [dp, mp] over all default ranks, on the CPU. Raises ``RuntimeError`` when their number is not dp * mp."""
    if dp * mp != dist.get_world_size():
        raise RuntimeError(f"a mesh of {dp} x {mp} needs {dp * mp} ranks, there are {dist.get_world_size()}")
    mesh = init_device_mesh("cpu", (dp, mp), mesh_dim_names=("dp", "mp"))
    dp_group = mesh.get_group("dp") if dp > 1 else None
    mp_group = mesh.get_group("mp") if mp > 1 else None
    return Mesh(dp, mp, dist.get_rank() // mp, dist.get_rank() % mp, dp_group, mp_group)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Returns the number of ranks, 1 for ``None``."""
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Returns this rank's number, 0 for ``None``."""
    return 0 if group is None else group.rank()


def gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """Returns all ranks' ``x`` concatenated along ``dim`` in rank order; the backward is a reduce_scatter (sum)."""
    if group is None:
        return x
    # Along dimension 0, and cut here: Dynamo of torch 2.12 cannot trace the same within all_gather_tensor_autograd.
    gathered: Tensor = funcol.all_gather_tensor_autograd(x.contiguous(), gather_dim=0, group=group)
    return gathered if dim == 0 else torch.cat(gathered.chunk(group.size()), dim)


class ColumnParallelLinear(nn.Module):
    """``relu(x @ weight.T + bias)`` where each rank holds and computes out_features / mp columns, then gathered along the columns.

    Input [B, in_features], the same on all ranks; output [B, out_features]. ``ValueError`` when the columns cannot be shared equally.
    """

    def __init__(self, in_features: int, out_features: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if out_features % group_size(group):
            raise ValueError(f"{out_features} columns cannot be shared equally by {group_size(group)} ranks")
        self.group = group
        self.shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(out_features // group_size(group), in_features))
        self.bias = nn.Parameter(torch.empty(out_features // group_size(group)))

    def forward(self, x: Tensor) -> Tensor:
        return gather(torch.relu(nn.functional.linear(x, self.weight, self.bias)), 1, self.group)


@dataclass(frozen=True)
class Table:
    """A categorical feature: ``rows`` of its embedding table and ``width`` ids per sample; with width > 1, id 0 is padding."""

    name: str
    rows: int
    width: int = 1


def balance(tables: Sequence[Table], parts: int) -> list[list[int]]:
    """Returns table positions for each part: largest table first, always to the part with the fewest rows (then the fewest tables)."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for position in sorted(range(len(tables)), key=lambda i: (-tables[i].rows, i)):
        part = min(range(parts), key=lambda r: (load[r], len(shares[r]), r))
        shares[part].append(position)
        load[part] += tables[position].rows
    return [sorted(share) for share in shares]


class ShardedEmbeddings(nn.Module):
    """Embedding tables, each held by one rank, for int64 ids [B, sum of widths] (the same on all ranks) -> [B, tables, dim].

    Several ids of a sample are averaged. Between lookup and exchange there are shape operations only. The exchange is an all_to_all,
    because ranks may hold different numbers of tables.
    """

    def __init__(self, tables: Sequence[Table], dim: int, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        if group_size(group) > len(tables):
            raise ValueError(f"{len(tables)} tables cannot be shared by {group_size(group)} ranks: every rank needs one")
        self.group, self.dim, self.table_list = group, dim, tuple(tables)
        self.shares = balance(tables, group_size(group))
        self.local = self.shares[group_rank(group)]
        self.starts = [sum(table.width for table in tables[:i]) for i in range(len(tables))]
        self.weights = nn.ParameterDict({tables[i].name: nn.Parameter(torch.empty(tables[i].rows, dim)) for i in self.local})

    def forward(self, ids: Tensor) -> Tensor:
        pooled = torch.stack([self._lookup(position, ids) for position in self.local])
        ranks, batch = group_size(self.group), ids.shape[0]
        if self.group is not None:
            # Every rank gets the vectors of all samples, table by table.
            outgoing = pooled.expand(ranks, len(self.local), batch, self.dim).reshape(-1, self.dim)
            incoming = [len(share) * batch for share in self.shares]
            pooled = funcol.all_to_all_single_autograd(outgoing, incoming, [len(self.local) * batch] * ranks, self.group)
        vectors = pooled.view(len(self.table_list), batch, self.dim).unbind(0)
        arrival = [position for share in self.shares for position in share]
        return torch.stack([vectors[arrival.index(i)] for i in range(len(arrival))], dim=1)

    def _lookup(self, position: int, ids: Tensor) -> Tensor:
        table, start = self.table_list[position], self.starts[position]
        weight = self.weights[table.name]
        if table.width == 1:
            return nn.functional.embedding(ids[:, start], weight)
        return nn.functional.embedding_bag(ids[:, start : start + table.width], weight, mode="mean", padding_idx=0)


def sharded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields names and parameters of which this rank holds a part only."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | ShardedEmbeddings):
            yield from ((f"{name}.{child}", parameter) for child, parameter in module.named_parameters())


@torch.no_grad()
def average_sharded_gradients(model: nn.Module, mp: int) -> None:
    """Divides the gradients of the sharded parameters by ``mp``, in place: call it after backward, before the optimizer's step."""
    for _, parameter in sharded_parameters(model):
        if mp > 1 and parameter.grad is not None:
            parameter.grad.div_(mp)


def wrap_data_parallel(model: nn.Module, mesh: Mesh, bucket_cap_mb: int | None = None) -> nn.Module:
    """Wraps ``model`` in DDP: sharded parameters are averaged over ``mesh.dp_group``, all others over all ranks.

    With mp > 1 these are two DDPs, one around the other, each set to ignore the parameters of the other; torch has no public way to give
    DDP a group per parameter. ``bucket_cap_mb``: MiB of a bucket. Returns ``model`` itself on a single rank.
    """
    if mesh.dp * mesh.mp == 1:
        return model
    if mesh.mp == 1:
        return DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    sharded = {name for name, _ in sharded_parameters(model)}
    replicated = [name for name, _ in model.named_parameters() if name not in sharded]
    wrapped = model
    if mesh.dp > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, replicated)
        wrapped = DistributedDataParallel(model, process_group=mesh.dp_group, bucket_cap_mb=bucket_cap_mb)
    prefix = "" if wrapped is model else "module."
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, [prefix + name for name in sorted(sharded)])
    return DistributedDataParallel(wrapped, bucket_cap_mb=bucket_cap_mb)
