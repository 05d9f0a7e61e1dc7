"""Decides about what one parameter group of ``fully_shard`` sends: its parameters to all ranks, and their gradients to the owners."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
    ProcessGroupAllocAllGather,
    ProcessGroupAllocReduceScatter,
)

from dct_compile.config import DCTConfig
from dct_compile.exchange import PARAMETER, SHARDED_GRADIENT, Collective, Exchange, Parameter, segments_of
from dct_compile.integrations.fsdp_comms import own_comm
from dct_compile.passes.collectives import GATHER, SCATTER
from dct_compile.passes.decision import Decision, dense
from dct_compile.passes.plan import LinkOf, decide
from dct_compile.reasons import Reason

DEFAULT_COMMS = (DefaultAllGather, ProcessGroupAllocAllGather, DefaultReduceScatter, ProcessGroupAllocReduceScatter)
"""What FSDP communicates with where nobody has set anything else."""

Trained = tuple[bool, ...]
"""For each parameter of a group whether it is trained."""


@dataclass(frozen=True)
class GroupPlan:
    """The decisions about one parameter group, ``None`` for what it does not send.

    ``gather``: of its parameters, before the forward. ``gather_again``: before the backward. ``reduce``: of the gradients.
    """

    gather: Decision | None
    gather_again: Decision | None
    reduce: Decision | None

    @property
    def decisions(self) -> list[Decision]:
        return [decision for decision in (self.gather, self.gather_again, self.reduce) if decision is not None]

    @classmethod
    def of(cls, group: Any, number: int, config: DCTConfig, link_of: LinkOf) -> "GroupPlan":
        """Decides about ``group``, an FSDPParamGroup. ``number``: its place in the model."""
        if not hasattr(group.mesh_info, "shard_process_group") or group.mesh_info.shard_process_group.size() == 1:
            return cls(None, None, None)
        gather = _decide(_gather(group, number), _reason_to_gather(group), config, link_of)
        again = gather if group._reshard_after_forward else None
        if again is not None and group._use_post_forward_mesh:
            again = dense(_gather_again(group, number), Reason.RESHARDED)
        trained = [held for held in group.fsdp_params if held.sharded_param.requires_grad]
        if not trained:
            return cls(gather, None, None)
        own = _reason_of_comm(group._reduce_scatter_comm, "reduce_scatter")
        return cls(gather, again, _decide(_reduce(group, trained, number), own, config, link_of))


def _decide(exchange: Exchange, reason: str | None, config: DCTConfig, link_of: LinkOf) -> Decision:
    return decide(exchange, config, link_of) if reason is None else dense(exchange, reason)


def _reason_to_gather(group: Any) -> str | None:
    if any(hasattr(held._sharded_local_tensor, "fsdp_pre_all_gather") for held in group.fsdp_params):
        return Reason.EXTENSION
    return _reason_of_comm(group._all_gather_comm, "all_gather")


def _reason_of_comm(comm: Any, collective: str) -> str | None:
    return None if type(own_comm(comm)) in DEFAULT_COMMS else Reason.OWN_COMM.format(collective=collective)


def _gather(group: Any, number: int) -> Exchange:
    dtypes = {held.param_dtype or held.orig_dtype for held in group.fsdp_params}
    # Where dtypes differ, FSDP gathers the bytes.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8
    size = sum(_shard(held) * (held.param_dtype or held.orig_dtype).itemsize for held in group.fsdp_params)
    return _exchange(GATHER, PARAMETER, group.fsdp_params, dtype, group.mesh_info.shard_process_group, number, size)


def _gather_again(group: Any, number: int) -> Exchange:
    """Describes the all_gather of the backward over fewer ranks, each of which holds more."""
    first, process_group = _gather(group, number), group.post_forward_mesh_info.shard_process_group
    times = group.mesh_info.shard_process_group.size() // process_group.size()
    assert first.dtype is not None
    return Exchange(
        first.collective,
        PARAMETER,
        first.name,
        (first.input_bytes * times // first.dtype.itemsize,),
        first.dtype,
        process_group.group_name,
        process_group.size(),
        process_group.rank(),
        first.input_bytes * times,
        number=number,
    )


def _reduce(group: Any, trained: Sequence[Any], number: int) -> Exchange:
    dtype = group._reduce_dtype or trained[0].param_dtype or trained[0].orig_dtype
    process_group = group._reduce_scatter_process_group
    size = sum(map(_shard, trained)) * dtype.itemsize * process_group.size()
    return _exchange(SCATTER, SHARDED_GRADIENT, trained, dtype, process_group, number, size, op="avg")


def _exchange(
    collective: Collective, kind: str, held: Sequence[Any], dtype: torch.dtype, group: ProcessGroup, number: int, size: int, op: str = ""
) -> Exchange:
    members = [Parameter(index, name_of(item), (_shard(item),)) for index, item in enumerate(held)]
    return Exchange(
        collective,
        kind,
        ", ".join(member.name for member in members),
        (size // dtype.itemsize,),
        dtype,
        group.group_name,
        group.size(),
        group.rank(),
        size,
        reduce_op=op,
        segments=segments_of(members),
        number=number,
    )


def trained_of(group: Any) -> Trained:
    """Returns which parameters of ``group``, an FSDPParamGroup, are trained now."""
    return tuple(held.sharded_param.requires_grad for held in group.fsdp_params)


def name_of(held: Any) -> str:
    """Returns the name of a parameter of FSDP in its model, without what ``torch.compile`` adds."""
    name: str = held._param_fqn or held._module_info.param_name
    return name.replace("_orig_mod.", "")


def _shard(held: Any) -> int:
    """Returns the elements of a parameter in the buffer of one rank, padding included."""
    numel: int = held._sharded_param_data.numel()
    return numel
