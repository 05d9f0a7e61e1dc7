"""One process: without a process group, with a group of one rank, without a compiler for the kernels, and with bad options."""

import importlib.metadata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.processes import run_python
from tests.ranks import fresh_compiler


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Sharded(Net):
    """With collectives, which in a group of one rank have nothing to do."""

    def forward(self, x: Tensor) -> Tensor:
        world = dist.group.WORLD
        h = funcol.all_to_all_single_autograd(torch.relu(self.first(x)), None, None, world)
        return funcol.all_reduce(self.last(h), "sum", world)


def train(model: nn.Module, compiled: Any) -> list[Tensor]:
    """Returns outputs of two steps and the parameters after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    outputs = []
    for step in range(2):
        output = compiled(torch.randn(8, 16, generator=torch.Generator().manual_seed(step)))
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(output.detach())
    return [*outputs, *(parameter.detach().clone() for parameter in model.parameters())]


def run(backend: Any, options: dict[str, Any] | None = None, mode: str | None = None) -> list[Tensor]:
    with fresh_compiler():
        model = Net()
        return train(model, torch.compile(model, backend=backend, options=options, mode=mode))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_a_graph_without_collectives_can_be_compiled_ahead_of_time(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(8, 16)
    with fresh_compiler(), torch._dynamo.config.patch(enable_aot_compile=True):
        compiled: Any = torch.compile(Net.forward, backend=dct, fullgraph=True)
        compiled.aot_compile(((model, x), {})).save_compiled_function(str(tmp_path / "compiled"))
    with (tmp_path / "compiled").open("rb") as file:
        assert torch.equal(torch.compiler.load_compiled_function(file)(model, x), model(x))


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return run("inductor")


def test_without_a_process_group_it_is_inductor(expected: list[Tensor]) -> None:
    with fresh_compiler():
        model = Net()
        assert_same(train(model, torch.compile(model, backend=dct, options={"dp_density": 0.01})), expected)
        report = dct_compile.report()
        assert report.sites == ()
        assert any("torch.distributed is not initialised" in note for note in report.notes)
        assert "torch.distributed is not initialised" in str(report)
        assert dct_compile.state_dict(model) == {}


def test_a_model_cut_over_devices_needs_no_process_group(expected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no two devices here. Its graphs are compiled with the passes, which find no copy."""
    for name in ("backend", "passes.foresight"):
        monkeypatch.setattr(f"dct_compile.{name}.has_several_accelerators", lambda *_: True)
    with fresh_compiler():
        model = Net()
        assert_same(train(model, torch.compile(model, backend=dct, options={"data_parallel": True})), expected)
        assert dct_compile.report().notes == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp_densty": 0.1}, ["'dp_densty'", "0.1", "'dp_density'"]),
        ({"mp_density": 0}, ["'mp_density'", "0", "(0, 1]"]),
        ({"gradient_scheme": "ring"}, ["'gradient_scheme'", "'ring'", "'owner'"]),
        ({"max_autotune": "yes"}, ["'max_autotune'", "'yes'", "bool"]),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], words: list[str]) -> None:
    with fresh_compiler(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Net(), backend=dct, options=options)(torch.randn(8, 16))
    assert isinstance(caught.value.inner_exception, ValueError)
    for word in words:
        assert word in str(caught.value.inner_exception)


@pytest.mark.parametrize("group", [False, True])
def test_a_bad_mode_is_named(group: bool, request: pytest.FixtureRequest) -> None:
    """As Inductor does, but at the first call: torch.compile hands a mode to no other backend earlier."""
    with pytest.raises(RuntimeError, match="Unrecognized mode=nonsense") as expected:
        torch.compile(Net(), backend="inductor", mode="nonsense")
    if group:
        request.getfixturevalue("group_of_one")
    with fresh_compiler():
        compiled = torch.compile(Net(), backend=dct, mode="nonsense")
        with pytest.raises(RuntimeError, match="Unrecognized mode=nonsense") as caught:
            compiled(torch.randn(8, 16))
    assert isinstance(caught.value, torch._dynamo.exc.BackendCompilerFailed)
    assert type(caught.value.inner_exception) is type(expected.value)
    assert str(caught.value.inner_exception) == str(expected.value)


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("given", [{"options": {"use_joint_graph_passes": False}}, {"mode": "lite"}])
def test_passes_that_inductor_would_not_run_are_an_error(given: dict[str, Any]) -> None:
    with fresh_compiler(), pytest.raises(RuntimeError, match="option 'use_joint_graph_passes' is False"):
        torch.compile(Sharded(), backend=dct, **given)(torch.randn(8, 16))


@pytest.mark.usefixtures("group_of_one")
def test_passes_given_as_options_run_once(expected: list[Tensor]) -> None:
    seen: list[str] = []

    def pass_named(name: str) -> Callable[[fx.Graph], None]:
        return lambda graph: seen.append(name)

    slots = ("joint_custom_pre_pass", "post_grad_custom_post_pass", "post_grad_custom_pre_pass")
    options = {slot: pass_named(slot) for slot in slots}
    assert_same(run(dct, {**options, "max_autotune": False, "dp_density": 0.5}), expected)
    assert set(seen) == set(slots)
    assert seen.count("joint_custom_pre_pass") == 1


@pytest.mark.usefixtures("group_of_one")
def test_a_pass_that_is_configured_runs_once() -> None:
    seen: list[fx.Graph] = []
    with torch._inductor.config.patch(joint_custom_pre_pass=seen.append):
        run(dct)
    assert len(seen) == 1


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductors_modes_are_its_own(expected: list[Tensor], mode: str) -> None:
    assert_same(run(dct, mode=mode), expected)


@pytest.mark.usefixtures("group_of_one")
def test_collectives_in_a_group_of_one_rank_are_dense_and_say_why(expected: list[Tensor]) -> None:
    with fresh_compiler():
        model = Sharded()
        assert_same(train(model, torch.compile(model, backend=dct, options={"data_parallel": True})), expected)
        sites = dct_compile.report().sites
        assert {site.kind for site in sites} >= {"activation", "gradient"}
        assert {site.decision for site in sites} == {"dense"}
        assert all(site.reason.endswith("a group of one rank sends nothing") for site in sites)
        assert {site.wire_bytes for site in sites} == {0}


@pytest.mark.usefixtures("group_of_one")
def test_ddp_in_a_group_of_one_rank_is_dense_and_says_why(expected: list[Tensor]) -> None:
    with fresh_compiler():
        model = Net()
        module = DistributedDataParallel(model)
        assert_same(train(model, torch.compile(module, backend=dct)), expected)
        assert [(site.decision, site.reason) for site in dct_compile.report().sites] == [("dense", "a group of one rank sends nothing")]


def test_the_installed_backend_is_found_by_name(expected: list[Tensor]) -> None:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    if "dct" not in points.names:
        pytest.skip("the package is not installed, so there is no entry point")
    assert points["dct"].load() is dct
    assert "dct" in torch._dynamo.list_backends()
    assert_same(run("dct"), expected)


OWN_KERNELS = """
import logging, sys
import torch
import dct_compile.ops
from dct_compile.triton_kernels.cpu import build
from dct_compile.triton_kernels.layout import GradientLayout, RowLayout, Selection
logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
torch.manual_seed(0)
grad, residual = torch.randn(5000), torch.zeros(5000)
threshold, counters = torch.full((1,), float("inf")), torch.zeros(1, 5, dtype=torch.int64)
layout, selection = GradientLayout(((0, 5000),), 256, 1, -1, 0.055, torch.bfloat16), Selection(0.05, "exact", 0.0, 1000, "geometric")
for _ in range(3):
    torch.ops.dct.select_threshold(grad, residual, threshold, counters, layout, selection, True)
    payload = torch.ops.dct.threshold_pack(grad, residual, threshold, counters, layout, True)
    result = torch.ops.dct.unpack_accumulate(payload, None, 5000, torch.float32, layout, 1)
rows = torch.ops.dct.pack_rows(grad.view(50, 100), RowLayout((100,), 5, torch.float32), "exact", 0.05, 0.0)
codes = torch.ops.dct.quantize_rows(grad.view(50, 100), torch.tensor([7]), 8)
torch.save([payload, result, residual, threshold, counters, rows, codes], sys.argv[1])
print(build.load_library() is not None)
"""


@pytest.fixture(scope="module")
def with_and_without_a_compiler(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Tensor], list[str], str]]:
    """Returns results, warnings and output of the kernels, compiled and not."""
    folder = tmp_path_factory.mktemp("kernels")

    def run(name: str, environment: dict[str, str]) -> tuple[list[Tensor], list[str], str]:
        file = folder / f"{name}.pt"
        done = run_python(OWN_KERNELS, file, **environment)
        return torch.load(file), [line for line in done.stderr.splitlines() if line.startswith("dct_compile.ops:")], done.stdout.strip()

    bare = {"CXX": str(folder / "no-such-compiler"), "DCT_COMPILE_CACHE_DIR": str(folder), "TMPDIR": str(folder)}
    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        return list(pool.map(run, ("compiled", "fallback"), ({}, bare)))


def test_without_a_compiler_the_kernels_fall_back_to_the_same_results(with_and_without_a_compiler: list[Any]) -> None:
    (compiled, _, loaded), (fallback, _, loaded_without) = with_and_without_a_compiler
    assert (loaded, loaded_without) == ("True", "False")
    assert_same(fallback, compiled)


def test_without_a_compiler_there_is_one_warning(with_and_without_a_compiler: list[Any]) -> None:
    (_, none, _), (_, (warning,), _) = with_and_without_a_compiler
    assert none == []
    assert "could not be compiled" in warning
