"""What find_sites sees in traced graphs: kinds, origins, twins, whose gradient, names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config as dynamo_config
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx, nn

from dct_compile.passes.sites import GraphContext, find_sites
from tests.small_models import (
    Averaged,
    Weighted,
    all_reduce,
    c10d,
    exchange,
    gather,
    ids,
    leaf,
    reduce_scatter,
    world,
)
from tests.torch_versions import needs_torch
from tests.tracing import Tracer, backward, fake_group, trace

A2A, AG, RS, AR = "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"


@pytest.mark.parametrize(
    ("collective", "forward", "gradient"),
    [(exchange, A2A, A2A), (gather, AG, RS), (reduce_scatter, RS, AG), (all_reduce, AR, AR)],
)
def test_activation_and_its_gradient_are_twins(collective: Callable[[Tensor], Tensor], forward: str, gradient: str) -> None:
    traced = trace(lambda x: collective(x.relu()).sin(), leaf(16, 64))
    assert traced.kinds == [(forward, "activation", "rectified"), (gradient, "activation_gradient", "computed")]
    first, second = (decision.site for decision in traced.decisions)
    assert first.twin is None
    assert second.twin is first


@pytest.mark.parametrize(
    "dim", [0, pytest.param(1, marks=needs_torch("2.13", "Dynamo cannot trace all_gather_tensor_autograd with gather_dim=1"))]
)
def test_gather_along_columns_is_an_activation_too(dim: int) -> None:
    assert [kind for _, kind, _ in trace(lambda x: gather(x.relu(), dim), leaf(16, 64)).kinds] == ["activation", "activation_gradient"]


def test_evaluation_has_no_gradient_sites() -> None:
    assert trace(lambda x: exchange(x.relu()), torch.randn(16, 64)).kinds == [(A2A, "activation", "rectified")]


def test_parameter_gather_is_no_activation() -> None:
    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shard = nn.Parameter(torch.randn(16 * 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ gather(self.shard.view(16, 64))

    traced = trace(Sharded(), leaf(8, 64))
    assert traced.kinds == [(AG, "parameter", "parameter"), (RS, "sharded_gradient", "computed")]
    assert traced.schemes == ["gathered_shards", "gathered_shards"]


def test_what_comes_from_behind_a_graph_break_is_foreign() -> None:
    def broken(x: Tensor) -> Tensor:
        hidden = x.relu()
        torch._dynamo.graph_break()
        return exchange(hidden.view(16, 64))

    with fake_group(4):
        tracer = Tracer()
        backward(tracer.compile(broken)(leaf(16, 64)))
    assert [traced.kinds for traced in tracer.traces] == [[(A2A, "activation", "foreign"), (A2A, "activation_gradient", "computed")]]


def test_leaf_inputs_are_not_foreign() -> None:
    assert trace(lambda x: exchange(x), leaf(16, 64)).kinds[0] == (A2A, "activation", "computed")


def test_twins_of_several_exchanges_are_not_mixed_up() -> None:
    def two(x: Tensor, y: Tensor) -> Tensor:
        return exchange(x.relu()).sin() + exchange(y.tanh()).cos()

    traced = trace(two, leaf(16, 64), leaf(16, 64))
    sites = [decision.site for decision in traced.decisions]
    assert [site.kind for site in sites] == ["activation"] * 2 + ["activation_gradient"] * 2
    by_activation = {"relu": "cos", "tanh": "sin"}  # the backward of sin multiplies with cos
    for site in sites[2:]:
        assert site.twin is not None
        assert site.twin.input is not None
        assert site.input is not None
        gradient_of = {factor.target for node in _upstream(site.input) for factor in node.all_input_nodes}
        activation = site.twin.input.target._schema.name.partition("::")[2]
        assert getattr(torch.ops.aten, by_activation[activation]).default in gradient_of


def _upstream(node: fx.Node) -> list[fx.Node]:
    return [node, *node.all_input_nodes]


def test_exchange_without_gradient_does_not_take_another_ones_twin() -> None:
    """Nodes that autograd does not record carry the sequence number of the differentiable operator before them."""

    def overlapped(x: Tensor, data: Tensor) -> Tensor:
        splits = [4] * 4
        started = c10d.all_to_all_single(x.relu(), splits, splits, world().group_name)
        other = c10d.all_to_all_single(data * 2, splits, splits, world().group_name)
        return c10d.wait_tensor(started).sin() * c10d.wait_tensor(other)

    traced = trace(overlapped, leaf(16, 64), torch.randn(16, 64))
    first, _, gradient = (decision.site for decision in traced.decisions)
    assert gradient.twin is first


def test_all_kinds_in_one_graph() -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 64)
            self.layer = Weighted()

        def forward(self, index: Tensor, x: Tensor) -> Tensor:
            return exchange(self.table(index)) * gather(torch.relu(self.layer(x)), 0)[:16]

    traced = trace(Hybrid(), ids(16), torch.randn(16, 64))
    assert sorted(traced.kinds) == sorted(
        [
            (A2A, "embedding", "embedding"),
            (AG, "activation", "rectified"),
            (RS, "activation_gradient", "computed"),
            (A2A, "embedding_gradient", "computed"),
            (AR, "gradient", "computed"),
        ]
    )
    assert [item.scheme for item in traced.decisions if item.site.kind == "gradient"] == ["owner"]
    assert all(decision.compressed for decision in traced.decisions)


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "broadcast": lambda x: funcol.broadcast(x, 0, world()),
    "all_reduce_coalesced": lambda x: funcol.all_reduce_coalesced([x, x * 2], "sum", world()),
    "all_gather_into_tensor_coalesced": lambda x: funcol.all_gather_into_tensor_coalesced([x, x * 2], world()),
    "reduce_scatter_tensor_coalesced": lambda x: funcol.reduce_scatter_tensor_coalesced([x, x * 2], "sum", [0, 0], world()),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_collectives_are_named_and_left_dense(name: str) -> None:
    traced = trace(lambda x: UNKNOWN[name](x.relu()), torch.randn(16, 64))
    assert [collective for collective, _, _ in traced.kinds] == [name]
    assert traced.schemes == ["dense"]
    assert traced.reasons == [f"{name} is not compressed"]
    assert traced.decisions[0].dense_bytes > 0


def apart(x: Tensor) -> Tensor:
    received = torch.empty_like(x)
    for work in (dist.isend(x.relu(), 1), dist.irecv(received, 1)):
        assert work is not None
        work.wait()
    return received.sin()


def together(x: Tensor) -> Tensor:
    received = torch.empty_like(x)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x.relu(), 1), dist.P2POp(dist.irecv, received, 1)]):
        work.wait()
    return received.sin()


@pytest.mark.parametrize(("function", "sent"), [(apart, {"isend": 4096, "irecv": 0}), (together, {"batch_p2p_ops": 4096})])
def test_messages_to_one_rank_are_named_and_left_dense(function: Callable[[Tensor], Tensor], sent: dict[str, int]) -> None:
    with dynamo_config.patch(enable_p2p_compilation=True):
        traced = trace(function, torch.randn(16, 64))
    assert {item.exchange.collective.name: item.dense_bytes for item in traced.decisions} == sent
    assert traced.reasons == [f"{name} is not compressed" for name in sent]


def test_in_place_all_reduce_is_left_dense() -> None:
    """Inductor's own passes make them; AOTAutograd refuses to trace one."""
    with fake_group(4):
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(16, 64, device="meta")
        node = graph.call_function(c10d.all_reduce_.default, (x, "sum", world().group_name))
        graph.output((graph.call_function(c10d.wait_tensor.default, (node,)),))
        sites = find_sites(graph, GraphContext(training=False))
    assert [(site.collective.name, site.kind) for site in sites] == [("all_reduce_", "activation")]


def test_integers_are_no_activations() -> None:
    splits = [4] * 4
    traced = trace(lambda x: c10d.wait_tensor(c10d.all_to_all_single(x + 1, splits, splits, world().group_name)), torch.arange(16))
    assert traced.kinds == [(A2A, "other", "counted")]


@needs_torch("2.13", "compiled autograd does not trace the backward of a functional collective")
def test_compiled_autograd_graph_has_gradients_of_unknown_parameters() -> None:
    with fake_group(4):
        tracer = Tracer()
        x = leaf(16, 64)
        loss = exchange(x.relu()).sum() + Averaged.apply(x).sum()  # type: ignore[no-untyped-call]
        with torch._dynamo.compiled_autograd._enable(tracer.compile):
            loss.backward()
    assert sorted(tracer.traces[0].kinds) == [(AR, "gradient", "computed"), (A2A, "activation_gradient", "foreign")]
    assert "compiled autograd's graph does not say whose gradient this is; use DDP's default reducer" in tracer.traces[0].reasons
    assert tracer.traces[0].schemes == ["dense", "dense"]


def test_looking_changes_nothing() -> None:
    traced = trace(lambda x: exchange(x.relu()), torch.randn(16, 64))
    before = str(traced.before)
    with fake_group(4):
        assert len(find_sites(traced.before, GraphContext(training=False))) == 1
    assert str(traced.before) == before
