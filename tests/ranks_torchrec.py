"""Sharded embeddings of torchrec, for tests that several ranks run. Only imported where torchrec is installed."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import collective_utils, comm
from torchrec.distributed import sharding_plan as plans
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

import dct_compile

ROWS, BATCH = 100, 64


class Model(nn.Module):
    """Embeddings, pooled or of each id, and an MLP above them."""

    def __init__(self, dims: Sequence[int], pooled: bool) -> None:
        super().__init__()
        names = [f"f{index}" for index in range(len(dims))]
        table = partial(EmbeddingBagConfig if pooled else EmbeddingConfig, num_embeddings=ROWS)
        tables = [table(embedding_dim=dim, name=f"t_{name}", feature_names=[name]) for name, dim in zip(names, dims, strict=True)]
        self.embeddings = (EmbeddingBagCollection if pooled else EmbeddingCollection)(tables=tables, device=torch.device("meta"))
        self.names, self.pooled = names, pooled
        self.top = nn.Sequential(nn.Linear(sum(dims), 256), nn.ReLU(), nn.Linear(256, 1))

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        found = self.embeddings(ids)
        vectors = found.values() if self.pooled else torch.cat([found[name].values() for name in self.names], dim=1)
        return self.top(vectors).squeeze(1)


SHARDINGS: dict[str, Callable[[int, int], Any]] = {
    "table": lambda index, ranks: plans.table_wise(rank=index % ranks),
    "column": lambda _, ranks: plans.column_wise(ranks=list(range(ranks))),
    "row": lambda _, ranks: plans.row_wise(),
    "mixed": lambda index, ranks: plans.row_wise() if index % 2 else plans.table_wise(rank=index % ranks),
    "table_row": lambda index, ranks: plans.table_row_wise(host_index=index % (ranks // comm.get_local_size(ranks))),
    "grid": lambda _, ranks: plans.grid_shard(host_indexes=list(range(ranks // comm.get_local_size(ranks)))),
}
RATE = 0.5
"""Of the SGD that is fused with the backward of the tables."""


def weights_of(index: int, dim: int) -> Tensor:
    """Returns the values that a table begins with."""
    return torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(index))


@contextmanager
def hosts_of(ranks: int | None) -> Iterator[None]:
    """While it lasts, hosts have so many ranks by what torchrun tells; ``None``: it tells nothing."""
    if ranks is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)


def parallel(
    dims: Sequence[int], sharding: str = "table", pooled: bool = True, encoded: bool = True, bits: int = 8, codecs: Any = None
) -> Any:
    """Returns the model under DistributedModelParallel, with the same values on each call. ``codecs``: of the sharder before."""
    collective_utils._INITIALIZED = False  # once in a process; a rank of another test may be new
    comm._INTRA_PG = comm._CROSS_PG = None  # of another test
    torch.manual_seed(0)
    model, ranks = Model(dims, pooled), dist.get_world_size()
    kind = EmbeddingBagCollectionSharder if pooled else EmbeddingCollectionSharder
    sharder = kind(fused_params={"learning_rate": RATE}, qcomm_codecs_registry=codecs)
    if encoded:
        sharder = dct_compile.torchrec_sharder(sharder, bits)
    of_tables = {f"t_{name}": SHARDINGS[sharding](index, ranks) for index, name in enumerate(model.names)}
    plan = plans.construct_module_sharding_plan(model.embeddings, of_tables, sharder, comm.get_local_size(ranks), ranks, "cpu")
    for table in plan.values():
        table.compute_kernel = "fused"  # which some of torchrec's functions do not take
    wrapped = DistributedModelParallel(model, device=torch.device("cpu"), plan=ShardingPlan({"embeddings": plan}), sharders=[sharder])
    for index, dim in enumerate(dims):
        (table,) = [tensor for name, tensor in wrapped.state_dict().items() if f"t_f{index}." in name]
        for shard in table.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.detach().copy_(weights_of(index, dim)[row : row + rows, column : column + columns])
    return wrapped


def ids_of(rank: int, step: int, features: int, batch: int = BATCH) -> KeyedJaggedTensor:
    """Returns one id of each feature for each of this rank's samples."""
    values = torch.randint(ROWS, (features * batch,), generator=torch.Generator().manual_seed(1000 * step + rank))
    return KeyedJaggedTensor([f"f{index}" for index in range(features)], values, lengths=torch.ones(features * batch, dtype=torch.int64))
