"""Rewriting of gradient all_reduces: the graph, and what several ranks compute with it over several steps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.passes.graph_utils import WAIT, argument
from dct_compile.triton_kernels.layout import GradientLayout, Selection
from tests.lockstep import make_inputs, run_in_lockstep, trace_all
from tests.small_models import Averaged, AveragedFlat, Layers, SummedAndDivided, Weighted, all_reduce, c10d, world
from tests.tracing import Trace, communication, dct, nodes_of, outputs, placeholders, trace

A2A, AG, AR = c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default, c10d.all_reduce.default
SELECT, PACK, UNPACK = dct.select_threshold.default, dct.threshold_pack.default, dct.unpack_accumulate.default
REPACK = dct.repack.default
GATHER_SCHEME = {SELECT: 1, PACK: 1, AG: 1, WAIT: 1, UNPACK: 1}
OWNER_SCHEME = {SELECT: 1, PACK: 1, A2A: 1, REPACK: 1, AG: 1, WAIT: 2, UNPACK: 1}


@pytest.mark.parametrize(("scheme", "wanted", "state"), [("gather", GATHER_SCHEME, 3), ("owner", OWNER_SCHEME, 6)])
def test_all_reduce_is_rewritten(scheme: str, wanted: dict[Any, int], state: int) -> None:
    traced = trace(Weighted(), torch.randn(16, 64), gradient_scheme=scheme)
    assert communication(traced.before) == {AR: 1, WAIT: 1}
    assert communication(traced.after) == wanted
    traced.after.lint()
    assert len(placeholders(traced.after)) == len(traced.inputs) + state + 1  # one tangent


@pytest.mark.parametrize("synchronise", [Averaged, SummedAndDivided, AveragedFlat])
def test_state_enters_as_inputs(synchronise: type[torch.autograd.Function]) -> None:
    traced = trace(Weighted(synchronise), torch.randn(16, 64), gradient_scheme="gather")
    select, pack = nodes_of(traced.after, SELECT)[0], nodes_of(traced.after, PACK)[0]
    state = placeholders(traced.after)[len(traced.inputs) :][:3]
    assert [argument(select, name) for name in ("residual", "threshold", "counters")] == state
    assert [argument(pack, name) for name in ("residual", "threshold", "counters")] == state
    assert [tuple(node.meta["val"].shape) for node in state] == [(4096,), (1,), (1, 5)]


def test_operators_carry_the_options() -> None:
    traced = trace(
        Weighted(),
        torch.randn(16, 64),
        gradient_scheme="gather",
        dp_density=0.02,
        threshold=0.25,
        refresh_interval=7,
        refresh_warmup="off",
        error_feedback=False,
        dp_value_dtype="int8",
        capacity_factor=1.5,
    )
    select, pack = nodes_of(traced.after, SELECT)[0], nodes_of(traced.after, PACK)[0]
    assert argument(select, "selection") == Selection(0.02, "fixed", 0.25, 7, "off", True)
    layout = argument(pack, "layout")
    assert argument(select, "layout") == layout
    assert (layout.segments, layout.block, layout.chunks, layout.chunk) == (((0, 4096),), 256, 1, -1)
    assert (layout.capacity_fraction, layout.value_dtype) == (pytest.approx(0.03), torch.int8)
    assert [argument(node, "error_feedback") for node in (select, pack)] == [False, False]


def test_owner_sends_each_chunk_to_its_owner() -> None:
    traced = trace(Weighted(), torch.randn(16, 64), gradient_scheme="owner", rank=2)
    exchange = nodes_of(traced.after, A2A)[0]
    layout = GradientLayout(((0, 4096),), 256, 4, -1, 0.01 * 1.1, torch.bfloat16)
    assert argument(exchange, "input_split_sizes") == argument(exchange, "output_split_sizes") == [layout.chunk_bytes] * 4
    pack, repack, unpack = (nodes_of(traced.after, op)[0] for op in (PACK, REPACK, UNPACK))
    assert [argument(node, "layout") for node in (pack, repack, unpack)] == [layout, replace(layout, chunk=2), layout]
    assert argument(unpack, "divisor") == 4, "the owner's sum is not divided"
    state = placeholders(traced.after)[len(traced.inputs) :][:6]
    assert [argument(node, name) for node in (pack, repack) for name in ("residual", "threshold", "counters")] == state


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dp_density": 1}, "dp_density=1 keeps everything"),
        ({"exempt": ["weight"]}, "exempt by pattern 'weight'"),
        ({"min_numel": 4097}, "fewer than min_numel=4097 elements"),
    ],
)
def test_left_alone(options: dict[str, Any], reason: str) -> None:
    traced = trace(Weighted(), torch.randn(16, 64), **options)
    assert traced.reasons == [reason]
    assert str(traced.after) == str(traced.before)
    assert traced.requests == []


class Maximum(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient, "max")


def test_other_reductions_are_left_alone() -> None:
    traced = trace(Weighted(Maximum), torch.randn(16, 64))
    assert communication(traced.after) == {AR: 1, WAIT: 1}


class WaitedTwice(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        started = c10d.all_reduce(gradient, "sum", world().group_name)
        return c10d.wait_tensor(started) / c10d.wait_tensor(started).norm()


def test_result_waited_for_twice_is_no_error() -> None:
    counts = communication(trace(Weighted(WaitedTwice), torch.randn(16, 64), gradient_scheme="gather").after)
    assert counts in ({AR: 1, WAIT: 2}, {**GATHER_SCHEME, WAIT: 1})


class Several(nn.Module):
    """Three parameters with an all_reduce each; the last one is small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Weighted(), Weighted(AveragedFlat)
        self.bias = nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x))) + Averaged.apply(self.bias)  # type: ignore[no-untyped-call]


def test_several_sites_keep_their_states_apart() -> None:
    traced = trace(Several(), torch.randn(16, 64), gradient_scheme="gather")
    assert communication(traced.after) == {SELECT: 2, PACK: 2, AG: 2, AR: 1, WAIT: 3, UNPACK: 2}
    by_name = {item.site.name: item.scheme for item in traced.decisions}
    assert by_name == {"first.weight": "gather", "second.weight": "gather", "bias": "dense"}
    residuals = {argument(node, "residual") for node in nodes_of(traced.after, PACK)}
    assert len(residuals) == 2
    sites = {item.site.name: item.site for item in traced.decisions}
    for request, place in zip(traced.requests, (0, 3), strict=True):
        residual = placeholders(traced.after)[len(traced.inputs) + place]
        packed = next(node for node in nodes_of(traced.after, PACK) if argument(node, "residual") is residual)
        gradient = sites[traced.inputs[request.positions[0]].name].input
        assert gradient is not None
        source = argument(packed, "grad")
        while source.target is torch.ops.aten.view.default and source.name != gradient.name:
            source = source.args[0]
        assert source.name == gradient.name


def test_beside_activations() -> None:
    traced = trace(Layers(exchanged=True), torch.randn(16, 64), data_parallel=True, gradient_scheme="gather", min_numel=64)
    assert sorted(traced.schemes) == ["gather", "row_threshold", "row_threshold"]
    counts = communication(traced.after)
    assert counts[SELECT] == counts[PACK] == counts[UNPACK] == counts[AG] == 1
    assert counts[A2A] == counts[dct.pack_rows.default] + counts[dct.gather_rows.default] == 2
    assert counts[AR] == 0  # the 32 biases of the top layer travel behind the payload


def test_what_mutates_state_stays_in_the_backward() -> None:
    traced = trace(Layers(), torch.randn(16, 64), data_parallel=True, gradient_scheme="owner", min_numel=1)
    assert communication(traced.forward) == {}
    assert communication(traced.backward) == OWNER_SCHEME
    assert {node.meta["partitioner_tag"] for node in traced.after.nodes if node.target in (SELECT, PACK, REPACK)} == {"is_backward"}


def test_residual_is_updated_in_place_not_copied() -> None:
    traced = trace(Weighted(), torch.randn(16, 64), gradient_scheme="gather")
    state = {node.name for node in placeholders(traced.after)[len(traced.inputs) :][:3]}
    assert not nodes_of(traced.after, torch.ops.aten.copy_.default)
    saved = {node.name for node in outputs(traced.forward) if node.op == "placeholder"}
    assert state <= saved, "the backward needs the state itself"


def run_steps(everyone: list[Trace], steps: int) -> tuple[list[Tensor], list[Tensor], list[list[Any]]]:
    """Steps of a model with one gradient: the dense results summed, the compressed ones summed, and each rank's state at the end."""
    count, total = len(everyone), len(everyone[0].requests[0].names)
    first = len(everyone[0].inputs)
    states = [make_inputs(item, rank)[first : first + total] for rank, item in enumerate(everyone)]
    dense, compressed = [torch.zeros(4096) for _ in range(count)], [torch.zeros(4096) for _ in range(count)]
    for step in range(steps):
        inputs = [make_inputs(item, rank + count * step) for rank, item in enumerate(everyone)]
        for values, state in zip(inputs, states, strict=True):
            values[first : first + total] = state
        for sums, graphs in ((dense, [item.before for item in everyone]), (compressed, [item.after for item in everyone])):
            for rank, result in enumerate(run_in_lockstep(graphs, inputs)):
                gradient = next(value for value in result[1:] if value is not None and value.numel() == 4096)
                sums[rank] += gradient.reshape(-1)
    return dense, compressed, states


@pytest.mark.parametrize("synchronise", [Averaged, SummedAndDivided, AveragedFlat])
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8"])
def test_gather_loses_nothing_over_time(synchronise: type[torch.autograd.Function], value_dtype: str) -> None:
    everyone = trace_all(Weighted(synchronise), torch.randn(16, 64), ranks=2, gradient_scheme="gather", dp_value_dtype=value_dtype)
    dense, compressed, states = run_steps(everyone, 4)
    assert torch.equal(compressed[0], compressed[1])
    assert 0 < int((compressed[0] != 0).sum()) < 2 * 4 * 47
    waiting = sum(state[0] for state in states) / 2
    torch.testing.assert_close(compressed[0] + waiting, dense[0], rtol=1e-5, atol=1e-4)
    assert [int(state[2][0, 0]) for state in states] == [4, 4]


@pytest.mark.parametrize(("ranks", "options"), [(2, {}), (4, {}), (2, {"dp_value_dtype": "int8"}), (2, {"dp_density": 0.0002})])
def test_owner_loses_nothing_over_time(ranks: int, options: dict[str, Any]) -> None:
    everyone = trace_all(Weighted(), torch.randn(16, 64), ranks=ranks, gradient_scheme="owner", **options)
    dense, compressed, states = run_steps(everyone, 4)
    for rank in range(1, ranks):
        assert torch.equal(compressed[0], compressed[rank])
    assert int((compressed[0] != 0).sum()) > 0
    owned = torch.stack([state[3] for state in states]).view(ranks, -1, 256).transpose(0, 1)  # units of 256 in turn
    waiting = sum(state[0] for state in states) + owned.reshape(-1)
    torch.testing.assert_close(compressed[0] + waiting / ranks, dense[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_equal_where_everything_fits(scheme: str) -> None:
    """A fixed threshold of 0 and room for half of the entries: relu leaves so many inputs, and with them gradients, zero."""

    class Sparse(Weighted):
        def forward(self, x: Tensor) -> Any:
            return super().forward(torch.relu(x - 3.5))

    options = {"threshold": 0.0, "dp_density": 0.4, "capacity_factor": 1.5, "dp_value_dtype": "float32"}
    dense, compressed, states = run_steps(trace_all(Sparse(), torch.randn(16, 64), ranks=2, gradient_scheme=scheme, **options), 2)
    assert int((dense[0] != 0).sum()) > 0
    torch.testing.assert_close(compressed, dense)
    assert all(float(state[0].abs().sum()) == 0 for state in states)


def test_without_error_feedback_the_rest_is_dropped() -> None:
    everyone = trace_all(Weighted(), torch.randn(16, 64), ranks=2, gradient_scheme="gather", error_feedback=False, dp_value_dtype="float32")
    dense, compressed, states = run_steps(everyone, 1)
    assert all(float(state[0].abs().sum()) == 0 for state in states)
    assert 41 <= int((compressed[0] != 0).sum()) <= 92
    assert not torch.equal(dense[0], compressed[0])


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_dense_members_of_a_bucket_are_exact(scheme: str) -> None:
    everyone = trace_all(
        Layers(), torch.randn(16, 64), ranks=2, gradient_scheme=scheme, data_parallel=True, exempt=["bottom.*"], min_numel=64
    )
    assert everyone[0].reasons == [f"{scheme}, density 0.01; dense: top.bias, bottom.bias, bottom.weight"]
    counts = communication(everyone[0].after)
    assert counts[AR] == 1
    inputs = [make_inputs(item, rank) for rank, item in enumerate(everyone)]
    alone = run_in_lockstep([item.before for item in everyone], inputs)
    together = run_in_lockstep([item.after for item in everyone], inputs)
    places = {info.name: 1 + position for position, info in enumerate(everyone[0].inputs)}
    for name in ("top.bias", "bottom.bias", "bottom.weight"):
        mean = (alone[0][places[name]] + alone[1][places[name]]) / 2
        torch.testing.assert_close(together[0][places[name]], mean)
        assert torch.equal(together[0][places[name]], together[1][places[name]])
    assert int((together[0][places["top.weight"]] != 0).sum()) < 100
