"""Averaging gradients without DDP: buckets, and where the collectives stand in the graph."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.buckets import BUCKET_BYTES
from dct_compile.passes.graph_utils import WAIT, argument
from dct_compile.passes.insert_gradient_sync import gradient_buckets
from dct_compile.passes.sites import Parameter
from tests.lockstep import make_inputs, run_in_lockstep
from tests.small_models import Layers, c10d, leaf
from tests.tracing import Tracer, communication, fake_group, nodes_of, outputs, trace

AR = c10d.all_reduce.default
DENSE = {"data_parallel": True, "dp_density": 1}


def parameters(*numels: int) -> list[Parameter]:
    return [Parameter(position, f"p{position}", (numel,)) for position, numel in enumerate(numels)]


def names(buckets: list[tuple[Parameter, ...]]) -> list[list[str]]:
    return [[parameter.name for parameter in bucket] for bucket in buckets]


def test_buckets_start_with_the_last_parameter() -> None:
    assert names(gradient_buckets([(item, torch.float32) for item in parameters(10, 20, 30)])) == [["p2", "p1", "p0"]]


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float32, [["p3", "p2"], ["p1"], ["p0"]]), (torch.bfloat16, [["p3", "p2", "p1"], ["p0"]])]
)
def test_buckets_hold_25_mib_unless_a_parameter_is_larger(dtype: torch.dtype, wanted: list[list[str]]) -> None:
    full = BUCKET_BYTES // 4
    assert BUCKET_BYTES == 25 * 1024 * 1024
    assert names(gradient_buckets([(item, dtype) for item in parameters(3 * full, full, 1, full - 1)])) == wanted


def test_buckets_hold_as_many_bytes_as_asked_for() -> None:
    items = [(item, torch.float32) for item in parameters(100, 10, 20, 30)]
    assert names(gradient_buckets(items, 200)) == [["p3", "p2"], ["p1"], ["p0"]]


def test_buckets_are_of_one_dtype() -> None:
    first, second, third = parameters(10, 20, 30)
    found = gradient_buckets([(first, torch.float32), (second, torch.bfloat16), (third, torch.float32)])
    assert names(found) == [["p2", "p0"], ["p1"]]


def test_no_parameters_no_buckets() -> None:
    assert gradient_buckets([]) == []


def test_one_all_reduce_for_all_gradients() -> None:
    traced = trace(Layers(), torch.randn(16, 64), **DENSE)
    assert communication(traced.before) == {}
    assert communication(traced.after) == {AR: 1, WAIT: 1}
    node = nodes_of(traced.after, AR)[0]
    assert argument(node, "reduce_op") == "avg"
    assert node.args[0].meta["val"].shape == (64 * 64 + 64 + 64 * 32 + 32,)
    segments = traced.decisions[0].site.segments
    assert [(item.parameter.name, item.offset) for item in segments] == [
        ("top.bias", 0),
        ("top.weight", 32),
        ("bottom.bias", 2080),
        ("bottom.weight", 2144),
    ]
    traced.after.lint()


@pytest.mark.parametrize("options", [{"dp_density": 1}, {"gradient_scheme": "gather"}])
def test_smaller_buckets_are_averaged_each_on_its_own(options: dict[str, Any]) -> None:
    with fake_group(2):
        tracer = Tracer()
        tracer.bucket_bytes = 10_000
        traced = tracer.trace(Layers(), torch.randn(16, 64), data_parallel=True, **options)
    assert [item.exchange.shape for item in traced.decisions] == [(32 + 64 * 32 + 64,), (64 * 64,)]


def test_gradients_are_averaged() -> None:
    everyone = [trace(Layers(), torch.randn(16, 64), ranks=2, rank=rank, **DENSE) for rank in range(2)]
    inputs = [make_inputs(item, rank) for rank, item in enumerate(everyone)]
    alone = run_in_lockstep([item.before for item in everyone], inputs)
    together = run_in_lockstep([item.after for item in everyone], inputs)
    for place, results in enumerate(zip(*alone, strict=True)):
        if place == 0 or results[0] is None:
            continue
        mean = (results[0] + results[1]) / 2
        for rank in range(2):
            torch.testing.assert_close(together[rank][place], mean)
            assert together[rank][place].shape == mean.shape


def test_waits_stand_at_the_end_after_all_computation() -> None:
    traced = trace(MixedTypes(), torch.randn(16, 64), **DENSE)
    order = {node: position for position, node in enumerate(traced.after.nodes)}
    waits = [order[node] for node in nodes_of(traced.after, WAIT)]
    products = [order[node] for node in nodes_of(traced.after, torch.ops.aten.mm.default)]
    starts = [order[node] for node in nodes_of(traced.after, AR)]
    assert len(waits) == len(starts) == 2
    assert min(waits) > max(products + starts)
    assert min(starts) < max(products), "the first bucket must not wait for the last gradient"


class MixedTypes(nn.Module):
    """A float32 layer below a bfloat16 layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(64, 64)
        self.top = nn.Linear(64, 32, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        return self.top(torch.relu(self.bottom(x)).bfloat16())


def test_one_bucket_per_dtype() -> None:
    traced = trace(MixedTypes(), torch.randn(16, 64), **DENSE)
    reduced = {node.args[0].meta["val"].dtype: node.args[0].meta["val"].numel() for node in nodes_of(traced.after, AR)}
    assert reduced == {torch.float32: 64 * 64 + 64, torch.bfloat16: 64 * 32 + 32}


def test_parameters_without_gradient_are_left_out() -> None:
    class Partly(Layers):
        def __init__(self) -> None:
            super().__init__()
            self.bottom.bias.requires_grad_(False)
            self.unused = nn.Parameter(torch.randn(256))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + self.unused.detach().sum()

    traced = trace(Partly(), torch.randn(16, 64), **DENSE)
    assert traced.decisions[0].site.name == "top.bias, top.weight, bottom.weight"
    assert nodes_of(traced.after, AR)[0].args[0].meta["val"].shape == (64 * 64 + 64 * 32 + 32,)


def test_parameters_that_share_a_gradient_node() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.randn(16, 64)), nn.Parameter(torch.randn(16, 64))

        def forward(self, x: Tensor) -> Any:
            return (x + self.one + self.other).sin()

    traced = trace(Twice(), torch.randn(16, 64), **DENSE)
    before = [item for item in outputs(traced.before)[1:] if item is not None]
    assert before[0] is before[1]
    after = [item for item in outputs(traced.after)[1:] if item is not None]
    assert after[0] is not after[1]
    assert nodes_of(traced.after, AR)[0].args[0].meta["val"].shape == (2048,)


def test_tangent_that_is_a_gradient_itself() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.randn(16, 64)), nn.Parameter(torch.randn(16, 64))

        def forward(self, x: Tensor) -> Any:
            return x + self.one, x.sin() + self.other

    traced = trace(Shifted(), torch.randn(16, 64), **DENSE)
    assert communication(traced.after) == communication(traced.backward) == {AR: 1, WAIT: 1}
    traced.after.lint()


def test_inputs_that_are_no_parameters_are_not_averaged() -> None:
    traced = trace(Layers(), leaf(16, 64), **DENSE)
    assert nodes_of(traced.after, AR)[0].args[0].meta["val"].shape == (64 * 64 + 64 + 64 * 32 + 32,)


def test_evaluation_averages_nothing() -> None:
    with torch.no_grad():
        traced = trace(Layers(), torch.randn(16, 64), **DENSE)
    assert communication(traced.after) == {}


def test_embedding_gradients_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Any:
            return torch.relu(x @ self.weight) @ self.weight.t()

    traced = trace(Tied(), torch.randn(16, 64), **DENSE)
    assert traced.decisions[0].site.name == "weight"
    assert communication(traced.after) == {AR: 1, WAIT: 1}
