"""The collectives of ``fully_shard`` with encoded messages: FSDP calls these objects where it would call its own.

FSDP calls them on streams of its own. A result is there when a call returns, also where FSDP asks for an asynchronous one: on a GPU the
work is enqueued by then, on a CPU it is done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from dct_compile.comm import Comm
from dct_compile.schemes.quantized_shards import QuantizedShards


@dataclass(eq=False)
class EncodedAllGather(AllGather):
    """Gathers parameters as ``offer`` encodes them. ``dense``: FSDP's own, for shards of another size and for other groups."""

    offer: QuantizedShards
    dense: AllGather

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.dense.allocate(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> dist.Work | None:
        """Fills ``output_tensor`` [ranks * numel] with the shards of all ranks, of which ``input_tensor`` [numel] is this one's."""
        expected = self.offer.exchange
        if group.group_name != expected.group or (input_tensor.numel(),) != expected.shape or input_tensor.dtype != expected.dtype:
            return self.dense(output_tensor, input_tensor, group, async_op)
        output_tensor.copy_(self.offer.gather(input_tensor, Comm(group.group_name, group.size())).view(-1))
        return None


@dataclass(eq=False)
class EncodedReduceScatter(ReduceScatter):
    """Reduces gradients as ``offer`` encodes them. ``dense``: FSDP's own."""

    offer: QuantizedShards
    dense: ReduceScatter

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.dense.allocate(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Fills ``output_tensor`` [numel] with this rank's part of the sum of all ``input_tensor`` [ranks * numel], times a factor.

        ``op``: AVG, SUM, or PREMUL_SUM with its factor, as FSDP's divide factors ask for. FSDP divides before and after by itself.
        """
        total = self.offer.reduce(input_tensor, Comm(group.group_name, group.size()))
        output_tensor.copy_(total * factor_of(op, group.size()))
        return None


def factor_of(op: Any, ranks: int) -> float | Tensor:
    """Returns the factor of a sum over ``ranks`` that a reduce operation of FSDP asks for."""
    if op == dist.ReduceOp.AVG:
        return 1 / ranks
    if op == dist.ReduceOp.SUM:
        return 1.0
    factor: float | Tensor = op.__getstate__()[1]  # of PREMUL_SUM
    return factor


def own_comm(comm: Any) -> Any:
    """Returns what FSDP or the user has set, in whose place ours may be."""
    return comm.dense if isinstance(comm, EncodedAllGather | EncodedReduceScatter) else comm
