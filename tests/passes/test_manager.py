"""The hook that runs all passes over a graph: order, state inputs, reports."""

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.testing._internal.two_tensor import TwoTensor

from dct_compile.config import DCTConfig
from dct_compile.measure import BucketMeasure
from dct_compile.passes.manager import JointGraphPass, StateNeededError, StateRequest
from dct_compile.report import NOTHING_COMPILED
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import BucketState
from tests.lockstep import make_inputs, run_in_lockstep
from tests.small_models import Layers, Weighted, exchange, leaf
from tests.states import state_spec
from tests.tracing import Tracer, backward, fake_group, placeholders, trace


def make_pass(runtime: Runtime, earlier: Any = (), **options: Any) -> JointGraphPass:
    return JointGraphPass("graph", DCTConfig(**options), [], [], None, runtime, earlier)


def captured_graph() -> fx.Graph:
    """A forward graph with one exchange, as a hook of Inductor sees it."""
    traced = trace(lambda x: exchange(x.relu()).sin(), torch.randn(16, 64))
    return fx.GraphModule({}, traced.before).graph


def test_users_own_passes_run_first() -> None:
    graph, seen = captured_graph(), []
    runtime = Runtime()
    with fake_group(4):
        make_pass(runtime, [lambda graph: seen.append(str(graph)), lambda graph: seen.append("second")])(graph)
    assert len(seen) == 2
    assert "pack_rows" not in seen[0]
    assert seen[1] == "second"
    assert "pack_rows" in str(graph)
    assert "pack_rows" not in runtime.reports.snapshot().graphs[0].before


def test_uuid_tells_options_apart() -> None:
    uuids = {make_pass(Runtime(), **options).uuid() for options in ({}, {"mp_density": 0.1}, {"exempt": ["a"]}, {"threshold": 0.5})}
    assert len(uuids) == 4
    assert make_pass(Runtime()).uuid() == make_pass(Runtime(), mp_density=0.05).uuid()


def test_graph_without_collectives_is_not_reported() -> None:
    with fake_group(4):
        tracer = Tracer()
        backward(tracer.compile(lambda x: x.relu())(leaf(16, 64)))
        assert tracer.report.graphs == ()
        assert tracer.report.sites == ()
        assert NOTHING_COMPILED not in tracer.report.notes


def test_report_tells_every_site() -> None:
    with fake_group(4):
        tracer = Tracer()
        traced = tracer.trace(Layers(exchanged=True), torch.randn(16, 64), data_parallel=True, exempt=["top.*"])
        report = tracer.report
    assert len(report.sites) == len(traced.decisions) == 3
    gradient = next(site for site in report.sites if site.kind == "gradient")
    assert (gradient.collective, gradient.decision, gradient.dtype, gradient.shape) == ("all_reduce", "compressed", "float32", (6240,))
    assert gradient.name == "top.bias, top.weight, bottom.bias, bottom.weight"
    assert gradient.reason == "owner, density 0.01; dense: top.bias, top.weight, bottom.bias"
    masked = [site for site in report.sites if site.kind != "gradient"]
    assert [site.density for site in masked] == [4 / 64, 4 / 64]
    assert {(site.group, site.group_size) for site in report.sites} == {(gradient.group, 4)}
    assert "all_to_all_single" in report.graphs[0].before
    assert "dct.pack_rows" not in report.graphs[0].before
    assert "dct.pack_rows" in report.graphs[0].after


def test_density_is_measured_once_it_has_run() -> None:
    with fake_group(2):
        tracer = Tracer()
        model = Weighted()
        compiled = tracer.compile(lambda x: model(x).sin())
        result = compiled(torch.randn(16, 64))
        assert tracer.report.sites[0].density is None
        backward(result)
        site = tracer.report.sites[0]
    assert site.density == pytest.approx(0.01, abs=0.0005)
    assert site.overflow == 0


def test_measure_adds_up_buckets() -> None:
    bucket = BucketState([], state_spec([100, 300]), torch.device("cpu"))
    assert BucketMeasure([bucket])() is None
    bucket.tensors["counters"][:] = torch.tensor([[2, 10, 1, 0, 5], [2, 30, 4, 4, 15]])
    assert BucketMeasure([bucket, bucket])() == (40 / 800, 10, None)


def test_measure_counts_the_owners_overflow() -> None:
    bucket = BucketState([], state_spec([100], ranks=2), torch.device("cpu"))
    bucket.tensors["counters"][0] = torch.tensor([1, 10, 2, 0, 10])
    bucket.tensors["owner_counters"][0] = torch.tensor([1, 5, 3, 0, 5])
    assert BucketMeasure([bucket])() == (0.1, 5, None)


def test_state_is_asked_for_and_then_found() -> None:
    traced = trace(Weighted(), torch.randn(16, 64))
    graph = fx.GraphModule({}, traced.before).graph
    with fake_group(4):
        missing = JointGraphPass("graph", DCTConfig(), traced.inputs, [], None, Runtime(), [])
        with pytest.raises(StateNeededError) as error:
            missing(graph)
        assert len(error.value.requests) == 1
        assert error.value.requests[0].matches(traced.requests[0])
        assert str(graph) == str(traced.before), "a graph that is traced again is not touched"


def test_requests_differ_by_parameter_and_geometry() -> None:
    request, owned = StateRequest((1,), state_spec([100])), StateRequest((1,), state_spec([100], ranks=2))
    assert request.matches(StateRequest((1,), state_spec([100])))
    assert not request.matches(StateRequest((2,), state_spec([100])))
    assert not request.matches(StateRequest((1,), state_spec([200])))
    assert not request.matches(owned)
    assert (len(request.names), len(owned.names)) == (3, 6)


def test_recompilation_and_evaluation_share_the_state() -> None:
    with fake_group(4):
        tracer = Tracer()
        model = Weighted()
        compiled = tracer.compile(model, dynamic=False)
        for rows in (16, 8, 16):
            backward(compiled(torch.randn(rows, 64)))
        with torch.no_grad():
            compiled(torch.randn(16, 64))
        state = tracer.runtime.states.state_dict(model)
    assert len(tracer.traces) == 2, "the evaluation holds no site: it is compiled as by Inductor"
    assert list(state) == ["weight"]
    assert int(state["weight"]["counters"][0]) == 3


def test_one_graph_for_several_layers_keeps_their_states_apart() -> None:
    """Dynamo guards on a layer's structure, not on its identity."""
    with fake_group(4):
        tracer = Tracer()
        layers = nn.Sequential(Weighted(), Weighted(), Weighted())
        for layer in layers:
            layer.forward = tracer.compile(layer.forward)  # type: ignore[method-assign]
        backward(layers(torch.randn(16, 64)))
        state = tracer.runtime.states.state_dict(layers)
    assert sorted(state) == ["0.weight", "1.weight", "2.weight"]
    assert [int(entry["counters"][0]) for entry in state.values()] == [1, 1, 1]


def test_two_buckets_in_one_graph() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bottom = nn.Linear(64, 64)
            self.top = nn.Linear(64, 64, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> Any:
            return self.top(torch.relu(self.bottom(x)).bfloat16())

    traced = trace(Mixed(), torch.randn(16, 64), data_parallel=True)
    assert traced.schemes == ["owner", "owner"]
    assert len(traced.requests) == 2


def test_tensor_subclass_as_input() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return exchange(x.relu())

    traced = trace(function, TwoTensor(torch.randn(16, 64), torch.randn(16, 64)))
    assert [kind for _, kind, _ in traced.kinds] == ["activation"] * 2


def test_parameter_of_several_tensors_cannot_be_averaged() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(TwoTensor(torch.randn(64, 64), torch.randn(64, 64)))

        def forward(self, x: torch.Tensor) -> Any:
            return x @ self.weight

    with pytest.raises(Exception, match="a parameter is a subclass of several tensors; data_parallel cannot average its gradient"):
        trace(Doubled(), torch.randn(16, 64), data_parallel=True)


def test_foreign_parameters_of_dynamo_graphs_are_named() -> None:
    traced = trace(Layers(), torch.randn(16, 64), data_parallel=True)
    names = [(info.name, info.is_parameter, info.is_trainable, info.is_foreign) for info in traced.inputs]
    assert ("bottom.weight", True, True, False) in names
    assert [is_parameter for _, is_parameter, _, _ in names].count(True) == 4
    assert not any(is_foreign for *_, is_foreign in names)


def test_density_one_is_the_dense_graph_bit_for_bit() -> None:
    options = {"mp_density": 1, "dp_density": 1, "embedding_codec": "dense"}
    everyone = [trace(Layers(exchanged=True), torch.randn(16, 64), ranks=2, rank=rank, **options) for rank in range(2)]
    inputs = [make_inputs(item, rank) for rank, item in enumerate(everyone)]
    before = run_in_lockstep([item.before for item in everyone], inputs)
    after = run_in_lockstep([item.after for item in everyone], inputs)
    for one, other in zip(before, after, strict=True):
        for left, right in zip(one, other, strict=True):
            assert (left is None and right is None) or torch.equal(left, right)
    assert len(placeholders(everyone[0].after)) == len(placeholders(everyone[0].before))
