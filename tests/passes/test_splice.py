"""Traced functions in the place of a collective: where their nodes stand, what they carry, and what they return."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dct_compile.comm import Comm
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.splice import copy_nodes, splice, trace
from tests.small_models import world
from tests.tracing import fake_group

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
Spliced = Callable[[Callable[..., Any]], tuple[fx.Graph, Any]]


@pytest.fixture
def spliced() -> Any:
    """Splices a function of one tensor into a graph of one all_reduce with work between its start and its wait."""
    with fake_group(4):

        def insert(function: Callable[..., Any]) -> tuple[fx.Graph, Any]:
            graph = fx.Graph(fx.GraphModule({}, fx.Graph()))
            x = graph.placeholder("x")
            with FakeTensorMode():
                x.meta["val"] = torch.empty(16, 64)
            started = graph.call_function(c10d.all_reduce.default, (x, "sum", world().group_name))
            between = graph.call_function(aten.neg.default, (x,))
            waited = graph.call_function(gu.WAIT, (started,))
            graph.output((waited, between))
            return graph, splice(function, [x], started, waited, {"mark": 1})

        yield insert


def names(graph: fx.Graph) -> list[str]:
    return [node.target._opname for node in graph.nodes if node.op == "call_function"]


def test_what_depends_on_a_wait_stands_where_the_wait_stood(spliced: Spliced) -> None:
    comm = Comm(world().group_name, 4)

    def twice(x: Tensor) -> Tensor:
        first = comm.wait(comm.all_to_all(x * 2))
        return comm.wait(comm.all_gather(first + 1)) - 1

    graph, result = spliced(twice)
    start = ["mul", "all_to_all_single", "all_reduce", "neg"]
    assert names(graph) == [*start, "wait_tensor", "add", "all_gather_into_tensor", "wait_tensor", "sub", "wait_tensor"]
    assert result.target is aten.sub.Tensor
    graph.lint()


def test_work_that_needs_no_exchange_starts_with_the_collective(spliced: Spliced) -> None:
    comm = Comm(world().group_name, 4)
    graph, (reduced, scaled) = spliced(lambda x: (comm.wait(comm.all_reduce(x, "avg")), x * 3))
    assert names(graph) == ["all_reduce", "mul", "all_reduce", "neg", "wait_tensor", "wait_tensor"]
    assert scaled.target is aten.mul.Tensor
    assert reduced.target is gu.WAIT


def test_nodes_carry_values_and_the_given_meta(spliced: Spliced) -> None:
    _, result = spliced(lambda x: (x * 2).sum(0))
    assert result.meta["mark"] == 1
    assert tuple(result.meta["val"].shape) == (64,)
    assert tuple(result.args[0].meta["val"].shape) == (16, 64)


def test_the_input_itself_and_nested_results_are_returned_as_nodes(spliced: Spliced) -> None:
    graph, result = spliced(lambda x: {"same": x, "pair": (x + 1, [x - 1])})
    assert result["same"] is next(iter(graph.nodes))
    assert result["pair"][0].target is aten.add.Tensor
    assert result["pair"][1][0].target is aten.sub.Tensor


def test_one_node_for_several_arguments(spliced: Spliced) -> None:
    graph, _ = spliced(lambda x: x)
    x = next(iter(graph.nodes))
    result = splice(lambda a, b: a - b, [x, x], x.next, x.next, {})
    assert result.args == (x, x)


def test_an_operator_that_updates_state_and_returns_nothing_is_kept(spliced: Spliced) -> None:
    def update(x: Tensor) -> Tensor:
        torch.ops.dct.store(x, x * 2)
        return x + 1

    graph, _ = spliced(update)
    assert names(graph)[:3] == ["mul", "store", "add"]


def test_constants_keep_to_themselves() -> None:
    """The partitioner may leave one of several constants in a graph, under the name that it had."""
    graph = fx.Graph(torch.nn.Module())
    assert graph.owning_module is not None
    graph.owning_module.register_buffer("dct_table_1", torch.full((4,), 100.0))
    x = graph.placeholder("x")
    output = graph.output((graph.call_function(aten.add.Tensor, (x, graph.get_attr("dct_table_1"))),))
    for factor in (2.0, 3.0):
        traced = trace(lambda x, factor=factor: x * torch.tensor([factor] * 4), [torch.zeros(4)])
        copies = copy_nodes(traced, [x], lambda inner, late: output, {})
        (product,) = (copies[item] for item in gu.output_node(traced.graph).args[:1])
        output.args = ((*output.args[0], product),)  # type: ignore[misc]
    results = fx.GraphModule(graph.owning_module, graph)(torch.ones(4))
    assert [result.tolist() for result in results] == [[101.0] * 4, [2.0] * 4, [3.0] * 4]
