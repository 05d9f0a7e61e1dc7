"""torchrec adds up pooled embeddings of tables that are sharded by rows with a reduce_scatter, which takes no codes: it is replaced.

::

    row_wise                       reduce_scatter over all ranks             ==>  a sum of encoded rows over all ranks
    row_wise, hosts with several   reduce_scatter over all ranks             ==>  reduce_scatter inside of a host,
     ranks each                                                                   a sum of encoded rows across hosts
    table_row_wise, grid_shard     reduce_scatter inside of a host,          ==>  reduce_scatter inside of a host,
                                   all_to_all across hosts                        all_to_all across hosts (takes codes)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dct_compile.embeddings.sums import RowCodecs, RowSum
from dct_compile.groups import ranks_per_host
from dct_compile.reasons import ENCODES_ITSELF
from dct_compile.report.torchrec import ENCODED_SUMS

_CREATING = ("_create_output_dist_module", "_create_output_dist_modules")
"""The methods by which torchrec makes its exchanges when they are first needed."""


@dataclass(frozen=True)
class Levels:
    """Groups for ``ranks`` that are numbered host by host: ``inside`` of this rank's host, and ``across``, with the same place on each."""

    inside: dist.ProcessGroup
    across: dist.ProcessGroup


class EncodedSums(nn.Module):
    """Stands in for torchrec's ``PooledEmbeddingsReduceScatter``, and for its variant with a batch size for each feature.

    Args:
        group: The ranks.
        codecs: Of partial sums and their gradients.
        levels: Two groups, where hosts add up before they exchange.
    """

    def __init__(self, group: dist.ProcessGroup, codecs: RowCodecs, levels: Levels | None) -> None:
        super().__init__()
        self.group, self.codecs, self.levels = group, codecs, levels

    @torch.compiler.disable(reason=ENCODES_ITSELF)  # type: ignore[untyped-decorator]
    def forward(
        self,
        local_embs: Tensor,
        input_splits: Sequence[int] | None = None,
        batch_size_per_rank_per_feature: Sequence[Sequence[int]] | None = None,
        embedding_dims: Sequence[int] = (),
    ) -> Any:
        """Starts to add up over the ranks, and returns torchrec's awaitable of the sums of this rank's samples.

        Args:
            local_embs: [samples of all ranks, D], or with a batch size for each feature [elements].
            input_splits: The samples of each rank. By default they are equal.
            batch_size_per_rank_per_feature: The samples of each rank and feature, for ``local_embs`` [elements].
            embedding_dims: The numbers of a vector of each feature.
        """
        from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable

        ranks = self.group.size()
        splits = list(input_splits or [len(local_embs) // ranks] * ranks)
        if batch_size_per_rank_per_feature is not None:
            counts = batch_size_per_rank_per_feature or [()] * ranks
            splits = [sum(count * dim for count, dim in zip(sizes, embedding_dims, strict=False)) for sizes in counts]
        return PooledEmbeddingsAwaitable(tensor_awaitable=self._summed(local_embs, splits))

    def _summed(self, x: Tensor, splits: list[int]) -> RowSum:
        from torchrec.distributed import comm_ops

        divided = comm_ops.get_gradient_division()
        if self.levels is None:
            return RowSum(x, splits, self.group, self.codecs, divided)
        inside, across = self.levels.inside, self.levels.across
        places = range(inside.size())
        parts = x.split(splits)
        ordered = torch.cat([part for place in places for part in parts[place :: inside.size()]])
        sizes = [sum(splits[place :: inside.size()]) for place in places]
        of_host = comm_ops.reduce_scatter_v_pooled(ordered, sizes, inside).wait()
        return RowSum(of_host, splits[inside.rank() :: inside.size()], across, self.codecs, divided)


def encode_sums(sharded: nn.Module, codecs: RowCodecs) -> None:
    """Lets the modules inside of ``sharded`` send codes where torchrec would call reduce_scatter. All ranks make this call.

    A module whose parts are not those of the torchrec that is known here stays as it is, and the report names its tables.
    """
    modules: Iterator[Any] = sharded.modules()
    for module in modules:
        for output, kind in _summing(module):
            name = next((name for name in _CREATING if hasattr(output, name)), None)
            if name is None or hasattr(output, ENCODED_SUMS):
                continue
            levels = _levels(output._pg) if kind == "row_wise" else None
            setattr(output, name, partial(_create, getattr(output, name), output, codecs, levels))
            setattr(output, ENCODED_SUMS, kind)
            if hasattr(module, "update_shards"):
                module.update_shards = partial(_update, type(module).update_shards, module, codecs)


def _summing(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Yields what adds up over ranks in a module of torchrec, with the type of its sharding."""
    from torchrec.distributed.sharding.grid_sharding import GridPooledEmbeddingDist
    from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist
    from torchrec.distributed.sharding.twrw_sharding import TwRwPooledEmbeddingDist

    kinds = {RwPooledEmbeddingDist: "row_wise", TwRwPooledEmbeddingDist: "table_row_wise", GridPooledEmbeddingDist: "grid_shard"}
    for output in [*getattr(module, "_output_dists", ()), getattr(module, "_output_dist", None)]:
        if type(output) in kinds:
            yield output, kinds[type(output)]


def _create(create: Callable[..., None], output: nn.Module, codecs: RowCodecs, levels: Levels | None, *args: Any) -> None:
    """Lets torchrec make the exchanges of ``output``, and replaces those that add up between hosts."""
    from torchrec.distributed import dist_data
    from torchrec.distributed.sharding.rw_sharding import RwPooledEmbeddingDist

    create(*args)
    for name, scatter in list(output.named_children()):
        if not isinstance(scatter, (dist_data.PooledEmbeddingsReduceScatter, dist_data.VariableBatchPooledEmbeddingsReduceScatter)):
            continue
        group = scatter._pg
        on_a_host = not isinstance(output, RwPooledEmbeddingDist) and ranks_per_host(group, "auto") == group.size()
        if group.size() > 1 and not on_a_host:
            setattr(output, name, EncodedSums(group, codecs, levels))


def _update(update: Callable[..., None], module: nn.Module, codecs: RowCodecs, *args: Any, **settings: Any) -> None:
    """Moves tables to other ranks as torchrec does, which makes the exchanges anew."""
    update(module, *args, **settings)
    encode_sums(module, codecs)


def _levels(group: dist.ProcessGroup) -> Levels | None:
    """Returns torchrec's groups inside of hosts and across, where ``group`` has several hosts with as many ranks each, as torchrun tells.

    Encoded addends are not added up on their way. So they would cross the link of a host once for each of its ranks.
    """
    from torchrec.distributed.comm import intra_and_cross_node_pg

    count = ranks_per_host(group, "auto")
    if count in (1, group.size()) or group.size() != dist.get_world_size():
        return None
    inside, across = intra_and_cross_node_pg()
    return Levels(inside, across) if inside is not None and inside.size() == count else None
