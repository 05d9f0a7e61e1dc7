"""Results that a graph returns, or writes to its inputs, stay exact: they are not thresholded by default."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.small_models import all_reduce, exchange, gather, ids, leaf, reduce_scatter
from tests.tracing import Trace, Tracer, backward, fake_group, trace

RETURNED = "the graph returns its result, to the caller or, after a graph break, to the next graph"
STORED = "its result is written to a buffer or another input, which keeps exact values"
KEPT = "row threshold, 4 of 64 kept"


def forward_reasons(traced: Trace) -> list[str]:
    return [decision.reason for decision in traced.decisions if decision.exchange.kind in ("activation", "embedding")]


def by_default(function: Callable[..., Any], *inputs: Any, **options: Any) -> Trace:
    return trace(function, *inputs, **{"mp_outputs": False, **options})


MOVED: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: exchange(x.relu()),
    "reshaped": lambda x: exchange(x.relu()).view(2, 8, 64).transpose(0, 1).contiguous(),
    "in another dtype": lambda x: exchange(x.relu()).double(),
    "in part": lambda x: exchange(x.relu()).chunk(2)[1],
    "beside others": lambda x: torch.cat([exchange(x.relu()), x]),
    "detached": lambda x: exchange(x.relu()).detach(),
    "scaled": lambda x: exchange(x.relu()) / 8 * 3,
    "shifted": lambda x: exchange(x.relu()) + 1,
    "scaled by one element": lambda x: exchange(x.relu()) * x.sum(),
    "beside its use": lambda x: (exchange(x.relu()),) * 2 + (exchange(x.relu()).sin(),),
    "in a structure": lambda x: {"logits": [exchange(x.relu())]},
}


@pytest.mark.parametrize("case", MOVED)
@pytest.mark.parametrize("training", [True, False])
def test_result_that_is_returned_stays_dense(case: str, training: bool) -> None:
    traced = by_default(MOVED[case], leaf(16, 64) if training else torch.randn(16, 64))
    assert forward_reasons(traced)[0] == RETURNED
    assert set(traced.reasons) <= {RETURNED, KEPT, f"its forward is dense: {RETURNED}", "the forward's mask, values only"}
    assert traced.schemes[0] == "dense"


def test_result_and_use_in_one() -> None:
    def both(x: Tensor) -> Any:
        y = exchange(x.relu())
        return y, y.sin()

    assert by_default(both, leaf(16, 64)).schemes == ["dense", "dense"]


@pytest.mark.parametrize("collective", [exchange, gather, reduce_scatter, all_reduce])
def test_every_collective(collective: Callable[[Tensor], Tensor]) -> None:
    traced = by_default(lambda x: collective(x.relu()), leaf(16, 64))
    assert traced.reasons == [RETURNED, f"its forward is dense: {RETURNED}"]


USED: dict[str, Callable[[Tensor], Tensor]] = {
    "an operator": lambda x: exchange(x.relu()).sin(),
    "a residual stream": lambda x: x + exchange(x.relu()),
    "a gate": lambda x: x.sigmoid() * exchange(x.relu()),
    "a square": lambda x: (y := exchange(x.relu())) * y,
    "a sum": lambda x: exchange(x.relu()).sum(),
}


@pytest.mark.parametrize("case", USED)
def test_result_that_is_computed_with_is_compressed(case: str) -> None:
    assert forward_reasons(by_default(USED[case], leaf(16, 64))) == [KEPT]


def test_option_compresses_returned_results() -> None:
    assert by_default(MOVED["as it is"], leaf(16, 64), mp_outputs=True).reasons == [KEPT, "the forward's mask, values only"]


def test_embedding_that_is_returned_is_not_rounded() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 64)

        def forward(self, rows: Tensor) -> Tensor:
            return exchange(self.table(rows))

    assert by_default(Table(), ids(16)).reasons == [RETURNED, f"its forward is dense: {RETURNED}"]


class Head(nn.Module):
    """Partial sums of ranks, and a bias behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return all_reduce(x.relu() @ self.weight) + self.bias


def test_bias_behind_the_sum_changes_nothing() -> None:
    assert forward_reasons(by_default(Head(), leaf(16, 64))) == [RETURNED]


def test_gathered_logits_of_a_column_parallel_head() -> None:
    with fake_group(2):
        mesh = init_device_mesh("cpu", (2,))
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 256, bias=False))
        parallelize_module(net, mesh, {"2": ColwiseParallel(output_layouts=Replicate())})
        tracer = Tracer()
        traced = tracer.trace(lambda x: net(x), torch.randn(8, 64), mp_outputs=False)
        assert forward_reasons(traced) == [RETURNED]
        with torch.no_grad():
            assert forward_reasons(tracer.trace(lambda x: net(x), torch.randn(8, 64), mp_outputs=False)) == [RETURNED]


def test_result_in_front_of_a_graph_break() -> None:
    def broken(x: Tensor) -> Tensor:
        y = exchange(x.relu())
        torch._dynamo.graph_break()
        return y.sin()

    with fake_group(4):
        tracer = Tracer()
        backward(tracer.compile(broken, mp_outputs=False)(leaf(16, 64)))
    assert [item.reasons for item in tracer.traces if item.decisions] == [[RETURNED, f"its forward is dense: {RETURNED}"]]


class Statistics(nn.Module):
    """Keeps a running sum over ranks in a buffer."""

    running: Tensor

    def __init__(self, update: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(64, 64))
        self.update = update

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.update(self.running, all_reduce(x.t() @ x))
        return x.sin()


def _put(running: Tensor, total: Tensor) -> None:
    running[2:8] = total[2:8]


WRITTEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copied": lambda running, total: running.copy_(total),
    "in part": _put,
    "as a running average": lambda running, total: running.mul_(0.9).add_(total, alpha=0.1),
    "interpolated": lambda running, total: running.lerp_(total, 0.1),
    "as a variance": lambda running, total: running.copy_(total / 64 - total * total),
    "as a mean": lambda running, total: running.lerp_(total.mean(0).expand(64, 64), 0.1),
    "as a sum": lambda running, total: running.mul_(0.9).add_(total.sum(), alpha=0.1),
    "as squares": lambda running, total: running.mul_(0.9).addcmul_(total, total, value=0.1),
    "as moments": lambda running, total: running.copy_(total.square().mean(0).sqrt().expand(64, 64)),
    "as variances": lambda running, total: running.lerp_(total.var(0).expand(64, 64), 0.1),
    "as largest magnitudes": lambda running, total: running.copy_(torch.maximum(running, total.abs())),
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_buffer_stay_exact(case: str, training: bool) -> None:
    inputs = leaf(16, 64) if training else torch.randn(16, 64)
    assert forward_reasons(by_default(Statistics(WRITTEN[case]), inputs)) == [STORED]
    assert forward_reasons(trace(Statistics(WRITTEN[case]), inputs)) == [STORED], "mp_outputs speaks of what is returned"


class RunningMean(nn.Module):
    """Centres its input by a running mean over ranks, whose new value it uses."""

    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running.lerp_(gather(x.relu()).mean(0), 0.1)
        return (x - self.running).tanh()


def test_mean_that_is_stored_and_then_used_stays_exact() -> None:
    assert forward_reasons(by_default(RunningMean(), leaf(16, 64))) == [STORED]


def test_statistics_of_a_norm_leave_its_input_compressed() -> None:
    norm = nn.BatchNorm1d(64)
    assert forward_reasons(by_default(lambda x: norm(gather(x.relu())).sin(), leaf(16, 64))) == [KEPT]


def test_written_input_that_wants_a_gradient() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.copy_(exchange(x.relu()))
        return y.sin()

    def written(x: Tensor, memory: Tensor) -> Tensor:
        memory.mul_(2).add_(exchange(x.relu()))
        return x.sin()

    assert forward_reasons(by_default(function, leaf(16, 64))) == [KEPT]
    assert forward_reasons(by_default(written, leaf(16, 64), torch.randn(16, 64))) == [STORED]
