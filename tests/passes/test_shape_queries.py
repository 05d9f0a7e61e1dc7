"""A question about the shape of a collective's result, between the collective and its wait, is no use of its values."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx, nn

from dct_compile.config import DCTConfig
from dct_compile.passes.graph_utils import WAIT
from dct_compile.passes.plan import plan
from dct_compile.passes.rewrite import rewrite
from dct_compile.passes.sites import GraphContext, find_sites
from tests.small_models import c10d, leaf, world
from tests.tracing import Trace, communication, dct, fake_group, nodes_of, trace

aten = torch.ops.aten


class Experts(nn.Module):
    """Sends rows to experts and back. Only the data know how many go where."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, received: Tensor, sent: Tensor) -> Tensor:
        arriving, leaving = received.tolist(), sent.tolist()
        for size in (*arriving, *leaving):
            torch._check(size >= 0)
            torch._check(size <= 100)
        there = self._exchange(self.first(x).relu(), arriving, leaving)
        back = self._exchange(self.expert(there).relu(), leaving, arriving)
        return (back.view(-1, 4, 16) * 2).sin()

    def _exchange(self, x: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        exchanged: Tensor = funcol.all_to_all_single_autograd(x, list(received), list(sent), world())
        return exchanged


@pytest.fixture(scope="module")
def traced() -> Trace:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        return trace(Experts(), leaf(16, 64), torch.tensor([4, 4]), torch.tensor([8, 8]), ranks=2)


def queries(graph: fx.Graph) -> list[fx.Node]:
    return nodes_of(graph, aten.sym_size.int)


def test_the_trace_asks_before_the_wait(traced: Trace) -> None:
    assert any(query.args[0].target is c10d.all_to_all_single.default for query in queries(traced.before))  # type: ignore[union-attr]


def test_both_ways_are_compressed(traced: Trace) -> None:
    assert traced.schemes == ["row_threshold"] * 4
    assert {node.meta["val"].dtype for node in nodes_of(traced.after, c10d.all_to_all_single.default)} == {torch.uint8, torch.bfloat16}


def test_the_result_is_asked_instead(traced: Trace) -> None:
    for before, after in zip(queries(traced.before), queries(traced.after), strict=True):
        assert after.args[0].target is dct.unpack_rows.default  # type: ignore[union-attr]
        assert str(after.meta["val"]) == str(before.meta["val"])
    for graph in (traced.before, traced.after):
        asked = [node.meta["val"].shape[0] for node in (query.args[0] for query in queries(graph))]  # type: ignore[union-attr]
        assert [str(size) for size in asked] == [str(query.meta["val"]) for query in queries(graph)]


def hand_made() -> tuple[fx.Graph, dict[str, fx.Node]]:
    """A forward whose size is asked for, and used, before the wait; another collective stands in between."""
    captured = trace(lambda x: funcol.all_gather_tensor(x.relu(), 0, world()).sin(), torch.randn(16, 64), ranks=4)
    graph: fx.Graph = fx.GraphModule({}, captured.before).graph
    started = nodes_of(graph, c10d.all_gather_into_tensor.default)[0]
    nodes: dict[str, fx.Node] = {"started": started, "wait": nodes_of(graph, WAIT)[0]}
    with graph.inserting_before(nodes["wait"]):
        for name, target, args in (
            ("query", aten.sym_size.int, (started, 0)),
            ("numel", aten.sym_numel.default, (started,)),
            ("filled", aten.full.default, None),
        ):
            given: Any = ([nodes["query"], 64], 1.0) if args is None else args
            nodes[name] = graph.call_function(target, given)
            nodes[name].meta["val"] = {"query": 64, "numel": 4096}.get(name, started.meta["val"])
    with graph.inserting_after(nodes["wait"]):
        nodes["sum"] = graph.call_function(aten.add.Tensor, (nodes["wait"], nodes["filled"]))
        nodes["sum"].meta["val"] = started.meta["val"]
    next(iter(graph.find_nodes(op="output"))).args = ((nodes["sum"],),)
    return graph, nodes


def test_what_depends_on_the_size_moves_behind_the_result() -> None:
    graph, nodes = hand_made()
    with fake_group(4):
        decisions = plan(find_sites(graph, GraphContext(training=False)), DCTConfig(), False)
        assert [decision.scheme for decision in decisions] == ["row_threshold"]
        rewrite(graph, decisions, lambda _: {})
    graph.lint()
    order = list(graph.nodes)
    result = nodes["query"].args[0]
    assert result.target is dct.unpack_rows.default  # type: ignore[union-attr]
    assert nodes["numel"].args[0] is result
    assert order.index(result) < order.index(nodes["query"]) < order.index(nodes["filled"]) < order.index(nodes["sum"])
    assert nodes["started"] not in order
    assert communication(graph)[dct.pack_rows.default] == 1


def test_a_reader_of_the_values_is_still_a_use() -> None:
    graph, nodes = hand_made()
    with graph.inserting_before(nodes["wait"]):
        read = graph.call_function(aten.neg.default, (nodes["started"],))
        read.meta["val"] = nodes["started"].meta["val"]
    with fake_group(4):
        decisions = plan(find_sites(graph, GraphContext(training=False)), DCTConfig(), False)
    assert [decision.reason for decision in decisions] == ["its result is used before it was waited for"]
