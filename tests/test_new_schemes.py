"""What "powersgd" and "random_k" have in common: nothing is lost, ranks stay equal, and everything around them works unchanged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dct_compile
from dct_compile.passes.graph_utils import WAIT
from dct_compile.state.bucket import BucketState
from tests.lockstep import make_inputs, run_in_lockstep, trace_all
from tests.side_by_side import SideBySide
from tests.small_models import Averaged, AveragedFlat, SummedAndDivided, Weighted, c10d
from tests.tracing import communication, dct, nodes_of, placeholders, trace

AR, STORE = c10d.all_reduce.default, dct.store.default
SHAPES = {"first": (30, 20), "bias": (20,), "kernel": (8, 5, 3, 3), "scale": (8,), "exempt": (20, 12), "last": (16, 40)}
COMPRESSED, DENSE = ("first", "kernel", "last"), ("bias", "scale", "exempt")
OPTIONS: dict[str, dict[str, Any]] = {
    "powersgd": {"gradient_scheme": "powersgd", "rank": 2, "min_numel": 100, "exempt": ["exempt"]},
    "random_k": {"gradient_scheme": "random_k", "dp_density": 0.1, "min_numel": 100, "exempt": ["exempt"]},
}
SCHEMES = tuple(OPTIONS)
OPS = {"powersgd": {AR: 2, WAIT: 2, STORE: 3}, "random_k": {AR: 1, WAIT: 1, STORE: 3}}
LOW = (torch.bfloat16, torch.float16)


def parts_of(buffer: Tensor) -> dict[str, Tensor]:
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    return dict(zip(SHAPES, buffer.split(sizes), strict=True))


def mean_of(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double() for tensor in tensors]).mean(0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("op", ["avg", "sum"])
def test_nothing_is_lost(scheme: str, ranks: int, op: str) -> None:
    side = SideBySide(SHAPES, ranks, op=op, **OPTIONS[scheme])
    scale = ranks if op == "sum" else 1
    assert [segment.parameter.name for segment in side.offer.members.compressed] == list(COMPRESSED)
    wanted, applied = torch.zeros(side.numel).double(), torch.zeros(side.numel).double()
    for step in range(8):
        grads = side.gradients(step)
        results = side.step(grads)
        assert all(torch.equal(result, results[0]) for result in results), "the ranks' results differ"
        wanted += mean_of(grads)
        applied += results[0].double() / scale
        for name in DENSE:
            reduced = torch.stack([parts_of(grad)[name] for grad in grads]).sum(0)
            assert torch.equal(parts_of(results[0])[name], reduced if op == "sum" else reduced / ranks), f"{name} is dense"
    residual = mean_of(side.residuals())
    assert residual.abs().max() > 0.1, "nothing was left out"
    torch.testing.assert_close(side.compressed(applied) + residual, side.compressed(wanted), rtol=0, atol=1e-5)
    for state in side.states:
        assert state.tensors["counters"].tolist() == [[8, 0, 0, 0, 0]] * 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("op", ["avg", "sum"])
def test_half_precision(scheme: str, dtype: torch.dtype, op: str) -> None:
    """What rounding takes away is, for each step, at most half a unit in the last place; "powersgd" keeps it in its residuals."""
    side = SideBySide(SHAPES, 2, dtype, op, **OPTIONS[scheme])
    scale = 2 if op == "sum" else 1
    wanted, applied, rounded = (torch.zeros(side.numel).double() for _ in range(3))
    for step in range(6):
        grads = side.gradients(step)
        results = side.step(grads)
        assert all(result.dtype == dtype and torch.equal(result, results[0]) for result in results)
        wanted += mean_of(grads)
        applied += results[0].double() / scale
        rounded += results[0].double().abs() / scale * torch.finfo(dtype).eps / 2
    assert side.states[0].tensors["residual"].dtype == torch.float32
    lost = side.compressed(applied) + mean_of(side.residuals()) - side.compressed(wanted)
    allowed = 1e-5 if scheme == "powersgd" else side.compressed(rounded) + 1e-5
    assert (lost.abs() <= allowed).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_error_feedback_the_rest_is_dropped(scheme: str) -> None:
    side = SideBySide(SHAPES, **OPTIONS[scheme], error_feedback=False)
    fresh = SideBySide(SHAPES, **OPTIONS[scheme], error_feedback=False)
    for step in range(3):
        side.step(side.gradients(step))
        assert not any(residual.any() for residual in side.residuals())
    for state, other in zip(side.states, fresh.states, strict=True):
        for name, tensor in state.tensors.items():
            other.tensors[name].copy_(tensor)
        other.tensors["residual"].fill_(5)
    grads = side.gradients(9)
    assert torch.equal(side.step(grads)[0], fresh.step(grads)[0]), "a residual of a run with error feedback is not added"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_value_that_is_not_finite_reaches_all_ranks_and_changes_no_state(scheme: str, bad: float, name: str) -> None:
    side = SideBySide(SHAPES, 3, **OPTIONS[scheme])
    other = SideBySide(SHAPES, 3, **OPTIONS[scheme])
    for step in range(5):
        grads = side.gradients(step)
        if step == 2:
            before = [{key: tensor.clone() for key, tensor in state.tensors.items()} for state in side.states]
            parts_of(grads[1])[name][7] = bad
            for result in side.step(grads):
                assert not result.isfinite().all()
            for state, old in zip(side.states, before, strict=True):
                for key, tensor in state.tensors.items():
                    assert torch.equal(tensor, old[key]), key
        else:
            assert torch.equal(side.step(grads)[0], other.step(grads)[0]), "as if the step had not been"
    assert all(residual.isfinite().all() for residual in side.residuals())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("synchronise", [Averaged, AveragedFlat, SummedAndDivided])
def test_all_reduce_of_a_graph_is_rewritten(scheme: str, synchronise: type[torch.autograd.Function]) -> None:
    options: dict[str, Any] = {"gradient_scheme": scheme, "dp_density": 0.05}
    traced = trace(Weighted(synchronise), torch.randn(16, 64), **options)
    assert communication(traced.before) == {AR: 1, WAIT: 1}
    assert communication(traced.after) == OPS[scheme]
    state = placeholders(traced.after)[len(traced.inputs) : len(traced.inputs) + 3]
    assert [node.args[0] for node in nodes_of(traced.after, STORE)] == state
    assert not nodes_of(traced.forward, STORE), "state is updated in the backward"
    assert communication(traced.backward) == OPS[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("synchronise", [Averaged, SummedAndDivided])
def test_rewritten_graphs_lose_nothing(scheme: str, synchronise: type[torch.autograd.Function]) -> None:
    options: dict[str, Any] = {"gradient_scheme": scheme, "dp_density": 0.05}
    ranks = trace_all(Weighted(synchronise), torch.randn(16, 64), ranks=3, **options)
    inputs = [make_inputs(traced, rank) for rank, traced in enumerate(ranks)]
    wanted = run_in_lockstep([traced.before for traced in ranks], [make_inputs(traced, rank) for rank, traced in enumerate(ranks)])
    dense = next(value for value in wanted[0] if isinstance(value, Tensor) and value.shape == (64, 64)).double()
    applied = torch.zeros(64, 64).double()
    for step in range(1, 7):
        results = run_in_lockstep([traced.after for traced in ranks], inputs)
        means = [next(v for v in values if isinstance(v, Tensor) and v.shape == (64, 64)) for values in results]
        assert all(torch.equal(mean, means[0]) for mean in means)
        applied += means[0].double()
        residuals = [values[len(traced.inputs)] for traced, values in zip(ranks, inputs, strict=True)]
        torch.testing.assert_close(applied + mean_of(residuals).view(64, 64), step * dense, rtol=0, atol=1e-4 * step)
    assert mean_of(residuals).abs().max() > 0.1


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.top = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Any:
        return self.top(torch.relu(self.bottom(x)))


@pytest.mark.parametrize(("scheme", "reason"), [("powersgd", "powersgd, rank 2; dense: "), ("random_k", "random_k, density 0.01; dense: ")])
def test_explain_for_many_ranks(scheme: str, reason: str) -> None:
    options = {"gradient_scheme": scheme, "rank": 2, "data_parallel": True, "min_numel": 129}
    report = dct_compile.explain(Layers(), torch.randn(8, 64), options=options, ranks=1024)
    (site,) = report.sites
    assert (site.kind, site.decision, site.group_size) == ("gradient", "compressed", 1024)
    assert site.reason.startswith(reason)
    elements = {"powersgd": 2 * (64 + 128 + 128 + 32), "random_k": 82 + 41}[scheme]  # 1 % of 8192 and of 4096, rounded up
    rest = 128 + 32
    assert site.wire_bytes == int(2 * 1023 * 4 * (elements + rest) / 1024)
    assert site.dense_bytes == int(2 * 1023 * 4 * (12288 + rest) / 1024)
    assert "store" in report.graphs[0].after


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("other", ["gather", *SCHEMES])
def test_another_scheme_takes_the_residual_over_and_starts_its_own_schedule(scheme: str, other: str) -> None:
    """A threshold of "gather" that starts anew is chosen at step 0: later on, hundreds of steps may pass until the next choice."""
    options = {**OPTIONS, "gather": {"gradient_scheme": "gather", "dp_density": 0.1, "min_numel": 100, "exempt": ["exempt"]}}
    first = SideBySide(SHAPES, **options[scheme])
    for step in range(3):
        first.step(first.gradients(step))
    spec = SideBySide(SHAPES, **options[other]).offer.state
    for state in first.states:
        moved = BucketState([], spec, torch.device("cpu"))
        back = BucketState([], state.spec, torch.device("cpu"))
        for index in range(len(COMPRESSED)):
            moved.write(index, state.entry(index))
            back.write(index, moved.entry(index))
        assert torch.equal(moved.tensors["residual"], state.tensors["residual"])
        assert torch.equal(back.tensors["residual"], state.tensors["residual"])
        steps = 3 if other == scheme else 0
        assert moved.tensors["counters"][:, 0].tolist() == [steps] * 3
        if other == scheme:
            assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in back.tensors.items())
