"""Higher-order operators: their subgraphs are reported and left as they are, and the graph around them is decided about as ever."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops import cond, scan, while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import dct_compile
from dct_compile.compiler.graph import JOINT_SLOT
from dct_compile.config import DCTConfig
from dct_compile.passes.manager import JointGraphPass
from dct_compile.runtime import Runtime
from tests.small_models import all_reduce, exchange
from tests.torch_versions import needs_torch
from tests.tracing import Trace, dct, nodes_of, trace

Function = Callable[[Tensor], Any]
KEPT, FOLLOWS = "row threshold, 4 of 64 kept", "the forward's mask, values only"
region = torch.compiler.nested_compile_region(lambda x: x.cos() * 3)
exchanging_region = torch.compiler.nested_compile_region(lambda x: exchange(x.cos()).sin())


def attend(x: Tensor) -> Any:
    heads = x.view(1, 2, 16, 32).repeat(1, 1, 8, 1)
    return flex_attention(heads, heads, heads, score_mod=lambda score, batch, head, query, key: score * 2)


def loop(step: Function) -> Function:
    def function(x: Tensor) -> Any:
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, step(y)), (torch.tensor(0), x.detach()))[1] + x

    return function


SILENT: dict[str, Function] = {
    "cond": lambda x: cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "while_loop": loop(lambda y: y.sin()),
    "scan": lambda x: scan(lambda carry, y: (carry + y, carry * y), x[0], x)[1],
    "invoke_subgraph": lambda x: region(region(x)),
    "checkpoint": lambda x: checkpoint(lambda x: x.sin().cos(), x, use_reentrant=False),
}
"""Functions whose subgraphs communicate nothing."""


class Around(nn.Module):
    """A linear layer whose result is exchanged, and ``function`` behind it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(64, 64), function

    def forward(self, x: Tensor) -> Any:
        return self.function(exchange(self.layer(x).relu()).sin())


def traced_around(function: Function, training: bool = True, **options: Any) -> Trace:
    with torch.set_grad_enabled(training):
        return trace(Around(function), torch.randn(16, 64), ranks=2, **options)


@pytest.mark.parametrize("operator", SILENT)
def test_graph_around_is_compressed(operator: str) -> None:
    traced = traced_around(SILENT[operator])
    assert traced.reasons == [KEPT, FOLLOWS]
    assert len(nodes_of(traced.after, dct.pack_rows.default)) == 1
    assert traced_around(SILENT[operator], training=False).reasons == [KEPT]


@pytest.mark.parametrize("operator", SILENT)
def test_gradients_around_are_averaged(operator: str) -> None:
    traced = traced_around(SILENT[operator], data_parallel=True)
    assert traced.reasons == [KEPT, FOLLOWS, "gather, density 0.01; dense: layer.bias"]
    assert len(traced.requests) == 1


def test_attention_with_a_changed_score() -> None:
    assert traced_around(attend, training=False).reasons == [KEPT]
    assert traced_around(attend, training=False, data_parallel=True).reasons == [KEPT]


COMMUNICATING: dict[str, tuple[Function, int, int]] = {
    "cond": (lambda x: cond(x.sum() > 0, lambda x: all_reduce(x.sin()).cos(), torch.cos, (x,)), 1, 2),
    "while_loop": (loop(lambda y: all_reduce(y.sin()).cos()), 1, 0),
    "scan": (lambda x: scan(lambda carry, y: (all_reduce(carry + y).sin(), carry * y), x[0], x)[1], 1, 1),
    "invoke_subgraph": (lambda x: exchanging_region(exchanging_region(x)), 2, 2),
}
"""Functions whose subgraphs communicate; how often forward and backward. The backward of a branch computes its forward anew."""
NEEDS = {"invoke_subgraph": needs_torch("2.13", "a collective with gradients cannot stand in nested_compile_region")}


@pytest.mark.parametrize("operator", [pytest.param(name, marks=NEEDS.get(name, ())) for name in COMMUNICATING])
def test_collectives_in_subgraphs_stay_dense_and_are_counted(operator: str) -> None:
    function, forward, backward = COMMUNICATING[operator]
    traced = traced_around(function)
    outer, inner = traced.decisions[:2], traced.decisions[2:]
    assert [decision.reason for decision in outer] == [KEPT, FOLLOWS]
    assert {decision.reason for decision in inner} == {f"it stands in a subgraph of {operator}, which is left as it is"}
    assert [decision.exchange.kind for decision in inner] == ["activation"] * forward + ["activation_gradient"] * backward
    assert all(decision.dense_bytes == decision.wire_bytes > 0 for decision in inner)
    assert traced_around(function, data_parallel=True).schemes[:3] == ["row_threshold", "row_threshold", "gather"]


def test_collectives_of_nested_subgraphs() -> None:
    def inner(x: Tensor) -> Any:
        return cond(x.sum() > 0, lambda x: all_reduce(x.sin()).cos(), torch.cos, (x,))

    traced = traced_around(loop(inner), training=False)
    assert traced.reasons == [KEPT, "it stands in a subgraph of cond, which is left as it is"]


def test_checkpointed_collective_is_part_of_the_graph_itself() -> None:
    def function(x: Tensor) -> Any:
        return checkpoint(lambda x: exchange(x.sin()).cos(), x, use_reentrant=False)

    assert traced_around(function).reasons == [KEPT, KEPT, FOLLOWS, FOLLOWS]


def test_report_shows_collectives_of_subgraphs() -> None:
    function, forward, backward = COMMUNICATING["cond"]
    report = dct_compile.explain(Around(function), torch.randn(16, 64), options={"data_parallel": True})
    inside = [site for site in report.sites if "subgraph of cond" in site.reason]
    assert len(inside) == forward + backward
    assert len(report.sites) == 3 + len(inside)
    assert [site.number for site in report.sites] == list(range(len(report.sites)))
    assert inside[0].name.startswith("small_models.py:")
    assert "subgraph of cond" in str(report)
    assert report.to_html().count("subgraph of cond") >= len(inside)


def test_users_own_pass_sees_subgraphs_as_with_inductor() -> None:
    seen: list[fx.Graph] = []
    function = Around(SILENT["cond"])
    torch._dynamo.reset()
    dct_compile.explain(function, torch.randn(16, 64), options={JOINT_SLOT: seen.append})
    assert len(seen) > 1
    assert any(nodes_of(graph, torch.ops.higher_order.cond) for graph in seen)


def test_pass_is_one_object_even_where_torch_copies_its_configuration() -> None:
    joint_pass = JointGraphPass("graph", DCTConfig(), [], [], None, Runtime(), [])
    assert copy.deepcopy({JOINT_SLOT: joint_pass})[JOINT_SLOT] is joint_pass
