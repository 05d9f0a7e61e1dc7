"""How often a joint graph is traced: once where the state of its gradients is known from the parameters, twice where it is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from dct_compile.config import DCTConfig
from dct_compile.passes.graph_input import GraphInput
from dct_compile.passes.manager import JointGraphPass, StateRequest, expected_requests
from dct_compile.runtime import Runtime
from tests.small_models import Layers, Weighted, exchange, world
from tests.tracing import fake_group, trace


class Partly(nn.Module):
    """One of its parameters gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Any:
        return self.used(x) + self.unused.detach().sum()


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[list[StateRequest]]:
    """Collects the state inputs of every trace."""
    seen: list[list[StateRequest]] = []
    run = JointGraphPass.__call__

    def watched(self: JointGraphPass, graph: fx.Graph) -> None:
        seen.append(list(self.requests))
        run(self, graph)

    monkeypatch.setattr(JointGraphPass, "__call__", watched)
    return seen


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], list[int]]] = {
    "data_parallel": (Layers, {"data_parallel": True}, [1]),
    "data_parallel with exchanges": (lambda: Layers(exchanged=True), {"data_parallel": True}, [1]),
    "data_parallel, all dense": (Layers, {"data_parallel": True, "dp_density": 1}, [0]),
    "data_parallel, low rank": (Layers, {"data_parallel": True, "gradient_scheme": "powersgd"}, [1]),
    "a parameter without a gradient": (Partly, {"data_parallel": True}, [1, 1]),
    "all_reduce in the graph": (Weighted, {}, [0, 1]),
    "exchange alone": (lambda: lambda x: exchange(x.relu()), {}, [0]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_joint_graph_is_traced_again_only_where_its_state_could_not_be_known(name: str, attempts: list[list[StateRequest]]) -> None:
    make, options, counts = CASES[name]
    traced = trace(make(), torch.randn(16, 64), **options)
    assert [len(requests) for requests in attempts] == counts
    assert traced.requests == attempts[-1]


def test_what_is_expected_follows_from_trainable_parameters_alone() -> None:
    def parameter(name: str, *shape: int, dtype: torch.dtype = torch.float32, trainable: bool = True) -> GraphInput:
        return GraphInput(name, dtype, shape, True, trainable, False)

    x = GraphInput("x", torch.float32, (16, 64), False, False, False)
    inputs = [parameter("a", 64, 64), x, parameter("frozen", 64, 64, trainable=False), parameter("half", 32, 64, dtype=torch.bfloat16)]
    with fake_group(4):
        found = expected_requests(inputs, world(), DCTConfig(), Runtime())
        assert expected_requests(inputs, None, DCTConfig(), Runtime()) == []
    assert [(request.positions, request.spec.numels) for request in found] == [((0,), (4096,)), ((3,), (2048,))]
