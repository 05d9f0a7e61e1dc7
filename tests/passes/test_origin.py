"""The origin of an exchange's input: what follows a ReLU is told from everything else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.small_models import all_reduce, exchange, gather, leaf, reduce_scatter
from tests.tracing import trace

RECTIFIED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": functional.relu6,
    "hardtanh from 0": lambda x: functional.hardtanh(x, 0.0, 3.0),
    "clamp": lambda x: x.clamp(min=0),
    "clamp of two sides": lambda x: x.clamp(0, 2),
    "squared": lambda x: torch.relu(x).square(),
    "scaled": lambda x: 0.5 * torch.relu(x) / 3,
    "by a gate": lambda x: torch.relu(x) * x.sigmoid(),
    "dropout": lambda x: functional.dropout(torch.relu(x), 0.1),
    "alpha dropped out columns": lambda x: torch.relu(x) * (torch.arange(64) % 2),
    "moved": lambda x: torch.relu(x).view(8, 2, 64).transpose(0, 1).reshape(16, 64),
    "two of them": lambda x: torch.cat([torch.relu(x), x.clamp(min=0)]),
    "gathered": lambda x: gather(torch.relu(x)),
    "exchanged": lambda x: exchange(torch.relu(x)),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "silu": functional.silu,
    "leaky": functional.leaky_relu,
    "clamp from below 0": lambda x: x.clamp(min=-1),
    "clamp from above": lambda x: x.clamp(max=0),
    "hardtanh": functional.hardtanh,
    "hard swish": functional.hardswish,
    "hard sigmoid gate": lambda x: x * functional.hardsigmoid(x),
    "shifted": lambda x: torch.relu(x) + 1,
    "divided by it": lambda x: 1 / (torch.relu(x) + 1),
    "a linear layer": lambda x: torch.relu(x) @ torch.ones(64, 64),
    "one of two": lambda x: torch.cat([torch.relu(x), x.tanh()]),
    "residual": lambda x: x + torch.relu(x),
    "summed": lambda x: all_reduce(torch.relu(x)),
    "scattered": lambda x: reduce_scatter(torch.relu(x)),
    "normalised": lambda x: functional.layer_norm(torch.relu(x), (64,)),
}


@pytest.mark.parametrize("case", RECTIFIED)
def test_what_follows_a_relu(case: str) -> None:
    kinds = trace(lambda x: gather(RECTIFIED[case](x.sin())).sin(), leaf(16, 64)).kinds
    assert [origin for _, kind, origin in kinds if kind == "activation"][-1] == "rectified"


@pytest.mark.parametrize("case", OTHER)
def test_what_does_not(case: str) -> None:
    kinds = trace(lambda x: gather(OTHER[case](x.sin())).sin(), leaf(16, 64)).kinds
    assert [origin for _, kind, origin in kinds if kind == "activation"][-1] == "computed"


def test_exchanged_embedding_is_one_still() -> None:
    table = nn.Embedding(8, 64)
    kinds = trace(lambda ids: gather(exchange(table(ids))).sin(), torch.randint(0, 8, (16,))).kinds
    assert [kind for _, kind, _ in kinds] == ["embedding", "embedding", "embedding_gradient", "embedding_gradient"]
