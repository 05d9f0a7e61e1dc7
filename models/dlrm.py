"""DLRM, the recommender of [Gupta21] section 5: two MLPs, embedding tables, pairwise dot products.

    dense [B, F] -> bottom MLP ---------> [B, 16] ----+
    ids [B, I] -> tables -> all_to_all -> [B, T, 16] -+-> dot products -> top MLP -> logit [B]

Plain PyTorch. With a process group it is model parallel (see :mod:`dct_compile.models.parallel`): the tables and the second layer of each
MLP are sharded. Those two layers (512 to 256) hold four fifths of the MLPs' weights; what they compute is exchanged after the ReLU, where
the paper cuts the model, too.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dct_compile.models.parallel import (
    ColumnParallelLinear,
    ShardedEmbeddings,
    Table,
    group_rank,
    group_size,
)


class DLRM(nn.Module):
    """Click probability (as a logit) from ``dense_features`` numbers and the categorical features ``tables``.

    ``bottom`` and ``top`` are the MLPs' widths; the last of ``bottom`` is the embedding dimension and the last of ``top`` is 1. Parameters
    are set by :meth:`reset_parameters`, which the constructor calls. ``ValueError`` for widths that do not fit.
    """

    def __init__(
        self,
        dense_features: int,
        tables: Sequence[Table],
        group: dist.ProcessGroup | None = None,
        bottom: Sequence[int] = (512, 256, 64, 16),
        top: Sequence[int] = (512, 256, 128, 1),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(bottom) < 3 or len(top) < 3 or top[-1] != 1:
            raise ValueError(f"MLPs need three layers at least and one output; got bottom {tuple(bottom)} and top {tuple(top)}")
        self.group = group
        dim, vectors = bottom[-1], len(tables) + 1
        self.embeddings = ShardedEmbeddings(tables, dim, group)
        self.bottom_first = nn.Linear(dense_features, bottom[0])
        self.bottom_wide = ColumnParallelLinear(bottom[0], bottom[1], group)
        self.bottom_last = _mlp(bottom[1:], last_relu=True)
        self.top_first = nn.Linear(dim + vectors * (vectors - 1) // 2, top[0])
        self.top_wide = ColumnParallelLinear(top[0], top[1], group)
        self.top_last = _mlp(top[1:], last_relu=False)
        self.reset_parameters(seed)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """``dense`` float32 [B, F] and ``ids`` int64 [B, I], the same on all ranks -> logits [B]."""
        embedded = self.embeddings(ids)
        bottom = self.bottom_last(self.bottom_wide(torch.relu(self.bottom_first(dense))))
        vectors = torch.cat([bottom.unsqueeze(1), embedded], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        # Not a buffer: DDP would send it at every step.
        row, column = torch.triu_indices(vectors.shape[1], vectors.shape[1], offset=1, device=dense.device)
        interaction = torch.cat([bottom, products.index_select(1, row * vectors.shape[1] + column)], dim=1)
        logits: Tensor = self.top_last(self.top_wide(torch.relu(self.top_first(interaction)))).squeeze(1)
        return logits

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Sets all parameters in place from ``seed``, to the same values whatever the group's size (DLRM's own initialisation)."""
        generator = torch.Generator().manual_seed(seed)
        rank, ranks = group_rank(self.group), group_size(self.group)
        for table in self.embeddings.table_list:
            full = torch.empty(table.rows, self.embeddings.dim).uniform_(-(table.rows**-0.5), table.rows**-0.5, generator=generator)
            if table.name in self.embeddings.weights:
                self.embeddings.weights[table.name].copy_(full)
        for layer in self.modules():
            if not isinstance(layer, nn.Linear | ColumnParallelLinear):
                continue
            outputs, inputs = layer.shape if isinstance(layer, ColumnParallelLinear) else layer.weight.shape
            weight = torch.randn(outputs, inputs, generator=generator) * (2 / (inputs + outputs)) ** 0.5
            bias = torch.randn(outputs, generator=generator) * outputs**-0.5
            sharded = isinstance(layer, ColumnParallelLinear)
            layer.weight.copy_(weight.chunk(ranks)[rank] if sharded else weight)
            layer.bias.copy_(bias.chunk(ranks)[rank] if sharded else bias)


def _mlp(widths: Sequence[int], last_relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers) if last_relu else nn.Sequential(*layers[:-1])
