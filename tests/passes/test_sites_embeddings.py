"""An exchange is an embedding exchange if nothing but shape operations lies between it and the tables."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.small_models import exchange, ids
from tests.tracing import trace


class Lookup(nn.Module):
    """Exchanges ``path`` of embedding vectors [16, 4, 32] of ids [16, 4]."""

    def __init__(self, path: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 32)
        self.path = path

    def forward(self, index: Tensor) -> Tensor:
        return exchange(self.path(self.table(index)).contiguous())


SHAPE_PATHS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda e: e,
    "view": lambda e: e.view(-1, 32),
    "reshape": lambda e: e.permute(1, 0, 2).reshape(-1, 32),
    "transpose": lambda e: e.transpose(0, 1),
    "slice": lambda e: e[:8, 1:3],
    "select": lambda e: e[:, 0],
    "cat": lambda e: torch.cat([e, e[:, :2]], 1),
    "stack": lambda e: torch.stack([e, e]).view(-1, 4, 32),
    "unbind": lambda e: torch.stack(e.unbind(1)),
    "split": lambda e: torch.cat(e.split([1, 3], 1)[::-1], 1),
    "chunk": lambda e: e.chunk(2, 1)[1],
    "expand": lambda e: e[:, :, None].expand(-1, -1, 2, -1),
    "squeeze": lambda e: e.unsqueeze(2).squeeze(2),
    "index": lambda e: e[torch.tensor([3, 1, 2, 0])],
    "index_select": lambda e: e.index_select(0, torch.arange(8)),
    "cast": lambda e: e.to(torch.bfloat16),
    "pad": lambda e: torch.nn.functional.pad(e, (0, 32)),
}


@pytest.mark.parametrize("path", SHAPE_PATHS)
def test_shape_operations_leave_an_embedding_an_embedding(path: str) -> None:
    traced = trace(Lookup(SHAPE_PATHS[path]), ids(16, 4))
    assert [(kind, origin) for _, kind, origin in traced.kinds] == [("embedding", "embedding"), ("embedding_gradient", "computed")]


@pytest.mark.parametrize("path", [lambda e: e * 2, lambda e: e + e, torch.tanh, lambda e: torch.cat([e, e.sin()], 1), lambda e: e.sum(1)])
def test_computing_with_an_embedding_makes_it_an_activation(path: Callable[[Tensor], Tensor]) -> None:
    assert trace(Lookup(path), ids(16, 4)).kinds[0] == ("all_to_all_single", "activation", "computed")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("training", [True, False])
def test_pooled_embeddings_are_embeddings(mode: str, training: bool) -> None:
    bag = nn.EmbeddingBag(8, 32, mode=mode).requires_grad_(training)
    table = nn.Embedding(8, 32).requires_grad_(training)
    traced = trace(lambda index: exchange(torch.stack([bag(index), table(index[:, 0])], 1).view(-1, 32)), ids(16, 4))
    assert [kind for _, kind, _ in traced.kinds] == ["embedding", "embedding_gradient"][: 1 + training]
