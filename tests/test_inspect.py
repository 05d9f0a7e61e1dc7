"""``dct_compile.explain``: it reports what compiling does, and leaves everything as it was."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.inspection import fake_ranks
from dct_compile.report import GRADIENTS_OUTSIDE, NOTHING_COMPILED, SiteReport
from dct_compile.runtime import RUNTIME
from tests.small_models import Layers, Weighted, all_reduce, exchange
from tests.tracing import Tracer, fake_group

X = torch.randn(16, 64)


class Busy(nn.Module):
    """Changes whatever a forward can change, in graphs and between them."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.layers, self.norm, self.dropout = Layers(exchanged=True), nn.BatchNorm1d(32), nn.Dropout()
        self.register_buffer("calls", torch.zeros(1))
        self.error, self.ran = error, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        hidden = self.dropout(self.norm(self.layers(x)))
        self.between(x)
        return exchange(hidden.relu())

    @torch.compiler.disable
    def between(self, x: Tensor) -> None:
        self.ran += 1
        with torch.no_grad():
            self.layers.bottom.weight.mul_(2)
        self.calls += 1
        x.add_(torch.randn_like(x))
        self.layers.top.weight.grad = torch.ones(32, 64)
        if self.error is not None:
            raise self.error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.relu(self.first(x)))


def essence(site: SiteReport) -> tuple[Any, ...]:
    """What must not depend on how a site was found."""
    return site.collective, site.kind, site.name, site.shape, site.decision, site.reason, site.dense_bytes, site.wire_bytes, site.pair


@pytest.mark.parametrize("options", [{"data_parallel": True}, {"mp_density": 0.5, "dp_value_dtype": "float32"}, {"mp_density": 1}])
def test_says_what_compiling_says(options: dict[str, Any]) -> None:
    model = Layers(exchanged=True)
    explained = dct_compile.explain(model, X, options=options, ranks=8)
    with fake_group(8):
        tracer = Tracer()
        tracer.trace(model, X, **options)
    assert explained.sites
    assert [essence(site) for site in explained.sites] == [essence(site) for site in tracer.report.sites]
    assert [graph.after for graph in explained.graphs] == [graph.after for graph in tracer.report.graphs]


@pytest.mark.parametrize("error", [None, ArithmeticError("broken")])
def test_leaves_model_inputs_and_generators_as_they_were(error: Exception | None) -> None:
    model, x = Busy(error), X.clone()
    gradient = torch.ones_like(model.layers.bottom.weight)
    model.layers.bottom.weight.grad = gradient
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    if error is None:
        report = dct_compile.explain(model, x)
        assert [site.kind for site in report.sites].count("activation") == 2
    else:
        with pytest.raises(ArithmeticError, match="broken"):
            dct_compile.explain(model, x)
    assert model.ran == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, X)
    assert model.layers.bottom.weight.grad is gradient
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == ["layers.bottom.weight"]
    assert torch.equal(torch.get_rng_state(), generator)
    assert not dist.is_initialized()


def test_process_wide_report_and_state_are_not_touched() -> None:
    dct_compile.reset_report()
    model = Weighted()
    assert dct_compile.explain(model, X).sites
    assert dct_compile.report().sites == ()
    assert RUNTIME.states.state_dict(model) == {}


def test_as_often_as_one_likes() -> None:
    """More often than Dynamo recompiles a function."""
    model = Layers(exchanged=True)
    limit = torch._dynamo.config.recompile_limit
    kept = [dct_compile.explain(model, X, options={"mp_density": 0.01 * (i + 1)}).sites[0].wire_bytes for i in range(limit + 2)]
    assert len(set(kept)) > limit // 2
    assert kept == sorted(kept)


def test_nothing_is_computed() -> None:
    """A matrix product of this size would take minutes and a hundred gigabytes."""
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(200_000, 100_000)})

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model["a"]

        def forward(self, x: Tensor) -> Any:
            return all_reduce(self.layer(x)[:, :64])

    report = dct_compile.explain(Wide(), torch.randn(8, 200_000, device="meta"), options={"data_parallel": True})
    gradient = next(site for site in report.sites if site.kind == "gradient" and site.name == "layer.weight")
    assert gradient.shape == (200_000 * 100_000,)


def test_ranks() -> None:
    for ranks in (1, 2, 1024):
        report = dct_compile.explain(Layers(exchanged=True), torch.randn(1024, 64), options={"data_parallel": True}, ranks=ranks)
        assert {site.group_size for site in report.sites} == {ranks}
    assert dct_compile.explain(Layers(exchanged=True), X).sites[0].group_size == 4
    alone = dct_compile.explain(Layers(exchanged=True), X, ranks=1)
    reason = "a group of one rank sends nothing"
    assert [site.reason for site in alone.sites] == [reason, f"its forward is dense: {reason}"]


def test_both_schemes_are_told() -> None:
    def gradient(**options: Any) -> SiteReport:
        report = dct_compile.explain(Net(), X, options={"data_parallel": True, "exempt": ["*.bias"], **options}, ranks=16)
        return next(site for site in report.sites if site.kind == "gradient")

    told, gathered, owned = gradient(), gradient(gradient_scheme="gather"), gradient(gradient_scheme="owner")
    assert told.offers["gather"] == gathered.wire_bytes
    assert told.offers["owner"] == owned.wire_bytes
    assert told.wire_bytes == min(gathered.wire_bytes, owned.wire_bytes)
    dense = gradient(gradient_scheme="gather", dp_density=0.9)
    assert dense.decision == "dense"
    assert dense.offers["gather"] > dense.dense_bytes


@pytest.mark.parametrize("inside", [False, True])
def test_ddp_is_foreseen_and_not_touched(inside: bool) -> None:
    with fake_group(4):
        model: Any = torch.compile(Net(), backend="dct") if inside else Net()
        module = DistributedDataParallel(model, bucket_cap_mb=1)
        synchronised = module.require_forward_param_sync, module.require_backward_grad_sync
        report = dct_compile.explain(module, X)
        assert (module.require_forward_param_sync, module.require_backward_grad_sync) == synchronised
        assert module not in RUNTIME.attached
        assert "comm_hook" not in module._get_ddp_logging_data()
        assert isinstance(module.module, OptimizedModule) == inside
    gradients = [site for site in report.sites if site.kind == "gradient"]
    assert [site.name for site in gradients] == ["second.bias, second.weight, first.bias, first.weight"]
    assert gradients[0].reason == "owner, density 0.01; dense: second.bias"


def test_a_bucket_of_ddp_that_is_sent_dense_within_a_millisecond_stays_dense() -> None:
    """Its hook takes as long on a CPU. A graph with ``data_parallel`` has no hook."""

    def gradients(dense_s: float, hooked: bool) -> list[str]:
        net = Net()
        size = 4 * sum(parameter.numel() for parameter in net.parameters())
        options = {"link": {"bytes_per_s": size / dense_s, "latency_s": 1e-7}, "data_parallel": not hooked}
        with fake_group(2):
            report = dct_compile.explain(DistributedDataParallel(net) if hooked else net, X, options=options)
        return [site.reason for site in report.sites if site.kind == "gradient"]

    (reason,) = gradients(1e-3, hooked=True)
    assert reason.startswith("gather would take 1.")
    assert ", dense takes 1 ms on a link of " in reason
    assert all(reason.startswith("gather, density") for reason in (*gradients(2e-3, hooked=True), *gradients(1e-3, hooked=False)))


def test_ddp_that_stays_dense_is_told_why() -> None:
    with fake_group(4):
        module = DistributedDataParallel(Net())
        report = dct_compile.explain(module, X, options={"dp_density": 1})
        assert [(site.kind, site.reason) for site in report.sites] == [("gradient", "dp_density=1 keeps everything")]
        module.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
        report = dct_compile.explain(module, X)
        assert [site.reason for site in report.sites] == ["DDP has a communication hook of its own"]


def test_skipped_model_is_told() -> None:
    with fake_group(4):
        report = dct_compile.explain(DistributedDataParallel(nn.Sequential(nn.Linear(64, 64))), X)
    assert report.notes == (NOTHING_COMPILED,)


def test_model_without_gradient_sites_is_told_where_they_are() -> None:
    report = dct_compile.explain(Layers(exchanged=True), X)
    assert report.notes == (GRADIENTS_OUTSIDE,)
    assert not dct_compile.explain(Layers(), X, options={"data_parallel": True}).notes


def test_named_inputs_and_functions() -> None:
    assert dct_compile.explain(Layers(exchanged=True), x=X).sites == dct_compile.explain(Layers(exchanged=True), X).sites
    sites = dct_compile.explain(lambda x: exchange(x.sin()), X).sites
    assert [site.kind for site in sites] == ["activation"]


def test_shape_that_depends_on_data() -> None:
    report = dct_compile.explain(lambda x: exchange(x[x > 0].reshape(-1, 1).expand(-1, 64).sin()), X)
    assert [site.kind for site in report.sites] == ["activation"]


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model is of type int; a torch.nn.Module or a function is expected"):
        dct_compile.explain(3, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 ranks were asked for; at least 1 is needed"):
        dct_compile.explain(Layers(), X, ranks=0)
    with pytest.raises(ValueError, match="option 'mp_density' is 2"):
        dct_compile.explain(Layers(), X, options={"mp_density": 2})
    with fake_ranks(2), pytest.raises(ValueError, match="ranks is 8, but a process group of 2 ranks is initialised: leave ranks out"):
        dct_compile.explain(Layers(), X, ranks=8)
    with pytest.raises(RuntimeError, match=r"same reduction dim|mat1 and mat2"):
        dct_compile.explain(Layers(), torch.randn(16, 3))
    assert not dist.is_initialized()


def test_graphs_are_told_node_by_node() -> None:
    """Before is the dense graph, with the all_reduce that ``data_parallel`` puts in; nodes bear the number of their site."""
    report = dct_compile.explain(Layers(exchanged=True), X, options={"data_parallel": True})
    (graph,) = report.graphs
    dense = {node.site: node for node in graph.nodes_before if node.operator.startswith("_c10d") and "wait" not in node.operator}
    assert {number: node.operator.split(".")[1] for number, node in dense.items()} == {
        site.number: site.collective for site in report.sites
    }
    assert "all_reduce" in graph.before
    forward, backward = ([node.operator for node in graph.nodes_after if node.site == number] for number in (0, 1))
    assert [name for name in forward if name.startswith("dct")] == ["dct.pack_rows.default", "dct.unpack_rows.default"]
    assert [name for name in backward if name.startswith("dct")] == ["dct.gather_rows.default", "dct.scatter_rows.default"]
    assert {node.backward for node in graph.nodes_after if node.site == 1} == {True}
    packed = next(node for node in graph.nodes_after if node.operator == "dct.pack_rows.default")
    assert (packed.shape, packed.dtype, packed.size) == ((16, 12), "uint8", 192)
    assert packed.source == report.sites[0].source
    assert "all_to_all_single_autograd" in packed.code
