"""One process: without a process group, with a group of one rank, without a compiler for the kernels, and with bad options."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
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
from tests.ranks import fresh_compiler

ROOT = Path(__file__).parent.parent


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
    """Outputs of two steps and the parameters after them."""
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


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return run("inductor")


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_it_is_inductor(expected: list[Tensor]) -> None:
    with fresh_compiler():
        model = Net()
        assert_same(train(model, torch.compile(model, backend=dct, options={"dp_density": 0.01})), expected)
        report = dct_compile.report()
        assert report.sites == ()
        assert any("torch.distributed is not initialised" in note for note in report.notes)
        assert "torch.distributed is not initialised" in str(report)
        assert dct_compile.state_dict(model) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp_densty": 0.1}, ["'dp_densty'", "0.1", "'dp_density'"]),
        ({"mp_density": 0}, ["'mp_density'", "0", "(0, 1]"]),
        ({"all_reduce": "ring"}, ["'all_reduce'", "'ring'", "'owner'"]),
        ({"max_autotune": "yes"}, ["'max_autotune'", "'yes'", "bool"]),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], words: list[str]) -> None:
    with fresh_compiler(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Net(), backend=dct, options=options)(torch.randn(8, 16))
    assert isinstance(caught.value.inner_exception, ValueError)
    for word in words:
        assert word in str(caught.value.inner_exception)


def test_inductors_own_options_modes_and_passes_still_work(group_of_one: None, expected: list[Tensor]) -> None:
    seen: dict[str, int] = {}

    def pass_named(name: str) -> Any:
        def count(graph: fx.Graph) -> None:
            seen[name] = seen.get(name, 0) + 1

        return count

    slots = ("joint_custom_pre_pass", "post_grad_custom_post_pass", "post_grad_custom_pre_pass")
    assert_same(run(dct, {slot: pass_named(slot) for slot in slots} | {"max_autotune": False, "dp_density": 0.5}), expected)
    assert set(seen) == set(slots)
    with torch._inductor.config.patch(joint_custom_pre_pass=pass_named("configured")):
        run(dct)
    assert seen["configured"] == 1
    for mode in ("default", "reduce-overhead"):
        assert_same(run(dct, mode=mode), expected)


def test_in_a_group_of_one_rank_everything_is_dense_and_says_why(group_of_one: None, expected: list[Tensor]) -> None:
    with fresh_compiler():
        model = Sharded()
        assert_same(train(model, torch.compile(model, backend=dct, options={"data_parallel": True})), expected)
        sites = dct_compile.report().sites
        assert {site.kind for site in sites} >= {"activation", "gradient"}
        assert {site.decision for site in sites} == {"dense"}
        assert all(site.reason.endswith("a group of one rank sends nothing") for site in sites)
        assert {site.wire_bytes for site in sites} == {0}
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
threshold, counters = torch.full((1,), float("inf")), torch.zeros(1, 4, dtype=torch.int64)
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


def test_without_a_compiler_the_kernels_fall_back_with_one_warning_and_the_same_results(tmp_path: Path) -> None:
    results, warnings = {}, {}
    for name, environment in (("compiled", {}), ("fallback", {"CXX": str(tmp_path / "no-such-compiler")})):
        file = tmp_path / f"{name}.pt"
        done = subprocess.run(
            [sys.executable, "-c", OWN_KERNELS, str(file)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(name == "compiled")
        results[name] = torch.load(file)
        warnings[name] = [line for line in done.stderr.splitlines() if line.startswith("dct_compile.ops:")]
    assert_same(results["fallback"], results["compiled"])
    assert warnings["compiled"] == []
    assert len(warnings["fallback"]) == 1
    assert "could not be compiled" in warnings["fallback"][0]
