"""Finds out how the parameters of a graph lie over the ranks that average gradients: which are copies, and which are shards."""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx
from torch.distributed import ProcessGroup
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dct_compile.passes.graph_input import PLAIN, GraphInput, Spread

Meshes = Mapping[int, DeviceMesh]


def spread_of(name: str, node: fx.Node, example: Tensor, group: ProcessGroup | None, meshes: Meshes) -> Spread:
    """Returns how a parameter lies over the ranks of ``group``.

    Args:
        name: The parameter's name, for an error.
        node: Its placeholder in the Dynamo graph.
        example: The example input.
        group: The ranks that average gradients; ``None`` where nobody does.
        meshes: What :func:`fsdp_meshes` returned.

    Raises:
        ValueError: The ranks of the group hold copies as well as shards of the parameter, or it is a sum that is not computed yet.
    """
    real = getattr(node.meta.get("grapharg"), "example", None)
    mesh = meshes.get(id(real)) if real is not None else None
    spread = PLAIN
    if isinstance(example, DTensor):
        if group is not None and any(placement.is_partial() for placement in example.placements):
            raise ValueError(f"parameter {name!r} has the placements {example.placements}: data_parallel cannot average a partial sum")
        sharded = [dim for dim, placement in enumerate(example.placements) if not placement.is_replicate()]
        spread = _over(name, "DTensor", example.device_mesh, sharded, group)
    if mesh is None or not spread.is_copy:
        return spread
    # FSDP reduces over its whole mesh. What a graph sees of its parameters is gathered.
    over_fsdp = _over(name, "FSDP", mesh, range(mesh.ndim), group)
    return over_fsdp if not over_fsdp.is_copy or not spread.manager else spread


def fsdp_meshes() -> dict[int, DeviceMesh]:
    """Returns the meshes over which FSDP (``fully_shard``) reduces, by the id of the gathered parameter."""
    found: dict[int, DeviceMesh] = {}
    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        groups: Any = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # an older torch, in which a module has one group, or no state of FSDP
            groups = filter(None, [getattr(state, "_fsdp_param_group", None)])
        for group in groups:
            gathered = [held._unsharded_param for held in group.fsdp_params if hasattr(held, "_unsharded_param")]
            found |= {id(parameter): group.mesh_info.mesh for parameter in gathered}
    return found


def _over(name: str, manager: str, mesh: DeviceMesh, sharded: Collection[int], group: ProcessGroup | None) -> Spread:
    """Returns the spread of a parameter that is sharded over the dimensions ``sharded`` of ``mesh``."""
    if group is None:
        return Spread(manager, is_copy=not sharded)
    ranks = dist.get_process_group_ranks(group)
    place = dict(zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.mesh.shape)), strict=True))
    inside = [place[rank] for rank in ranks if rank in place]
    crossed = tuple(dim for dim in range(mesh.ndim) if len({coordinates[dim] for coordinates in inside}) > 1)
    torn = [dim for dim in crossed if dim in sharded]
    if torn and (len(inside) < len(ranks) or len(torn) < len(crossed)):
        raise ValueError(
            f"parameter {name!r}: {manager} shards it over some of the ranks {ranks} that data_parallel averages over ({mesh}), and others"
            " hold copies. Give the group of ranks that hold copies of it, such as options={'data_parallel': mesh['dp'].get_group()}"
        )
    return Spread(manager, is_copy=not torn, crossed=crossed)


def watchers(inputs: Sequence[GraphInput], reduced: set[int]) -> dict[int, Callable[[Any], Any]]:
    """Returns functions to call on parameters while the graph is traced, by position.

    DTensor sums the gradient of a copy itself where it traced that gradient as a partial sum or as shards. The graph of local tensors does
    not show it. A hook on the parameter does.

    Args:
        inputs: The inputs of the graph.
        reduced: The positions of such parameters are added to it.
    """

    def watcher(position: int, crossed: Sequence[int]) -> Callable[[Any], Any]:
        def note(gradient: Any) -> None:
            if not all(gradient.placements[dim].is_replicate() for dim in crossed):
                reduced.add(position)

        def watch(parameter: Any) -> Any:
            parameter.register_hook(note)
            return parameter

        return watch

    return {
        position: watcher(position, info.spread.crossed)
        for position, info in enumerate(inputs)
        if info.is_trainable and info.spread.manager == "DTensor" and info.spread.is_copy and info.spread.crossed
    }
