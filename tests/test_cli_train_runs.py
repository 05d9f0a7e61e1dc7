"""``dct train`` on real ranks: whole runs, and what finds a replica that differs."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch import nn

from dct_compile.cli.backends import HOOKS
from dct_compile.cli.main import main
from dct_compile.cli.methods import compile_with, computed_bytes
from dct_compile.cli.replicas import ReplicaMismatch, check_replicas
from dct_compile.models.dlrm import DLRM
from dct_compile.models.parallel import Table, make_mesh
from dct_compile.models.resnet import ResNet
from dct_compile.models.texts import shakespeare
from tests.processes import ROOT
from tests.rank_pool import Ranks
from tests.small_images import write_images

pytestmark = pytest.mark.distributed

SMALL = ["--dataset", "synthetic", "--batch-size", "512"]


def verdict(rank: int, world_size: int, dp: int, mp: int, changed: str) -> str:
    """Returns the outcome of a check after one value of the parameter ``changed`` was changed on rank 1."""
    mesh = make_mesh(dp, mp)
    model = DLRM(2, (Table("a", 4), Table("b", 4)), mesh.mp_group, bottom=(8, 4, 2), top=(8, 4, 1))
    check_replicas(model, mesh, "before")
    if rank == 1:
        with torch.no_grad():
            model.get_parameter(changed).view(-1)[0] += 1e-6
    try:
        check_replicas(model, mesh, "step 7")
    except ReplicaMismatch as error:
        return str(error)
    return "identical"


@pytest.mark.parametrize(("dp", "mp", "changed"), [(2, 1, "top_first.weight"), (2, 1, "embeddings.weights.a"), (1, 2, "top_first.bias")])
def test_every_rank_finds_one_changed_value(ranks2: Ranks, dp: int, mp: int, changed: str) -> None:
    assert ranks2(verdict, dp, mp, changed) == ["step 7: the parameters of rank 1 differ from those of its replicas"] * 2


def test_parts_of_a_layer_are_not_compared(ranks2: Ranks) -> None:
    """The two ranks hold different parts of this layer."""
    assert ranks2(verdict, 1, 2, "top_wide.weight") == ["identical"] * 2


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Returns the metrics and the output of a run with both backends."""
    folder = tmp_path_factory.mktemp("both")
    size = ["--seeds", "2", "--epochs", "2", "--dp", "2", "--mp", "1", "--dp-density", "0.05", "--lr", "0.02"]
    result = CliRunner().invoke(main, ["train", *SMALL, *size, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "metrics.json").read_text()), result.output


@pytest.mark.slow
def test_options_are_in_the_results(both: tuple[dict[str, Any], str]) -> None:
    assert both[0]["settings"]["options"] == {"dp_density": 0.05, "link": "1Gbit/s"}


@pytest.mark.slow
def test_both_backends_train_with_the_same_batches(both: tuple[dict[str, Any], str]) -> None:
    dense, dct = both[0]["backends"]
    for run_dense, run_dct in zip(dense["runs"], dct["runs"], strict=True):
        assert run_dense["steps"] == run_dct["steps"] == len(run_dct["losses"]) == 12
        # The first loss is taken before any gradient was sent: same parameters, same batch.
        assert run_dct["losses"][0] == pytest.approx(run_dense["losses"][0], rel=1e-5)


@pytest.mark.slow
def test_a_compressed_training_learns(both: tuple[dict[str, Any], str]) -> None:
    for run in both[0]["backends"][1]["runs"]:
        assert run["losses"][-1] < run["losses"][0]


@pytest.mark.slow
def test_the_density_is_the_one_asked_for(both: tuple[dict[str, Any], str]) -> None:
    for run in both[0]["backends"][1]["runs"]:
        assert run["density"][-1][1] == pytest.approx(0.05, rel=0.5)


@pytest.mark.slow
def test_sites_are_those_of_the_compressed_training(both: tuple[dict[str, Any], str]) -> None:
    dense, dct = both[0]["backends"]
    assert dense["sites"] == [[], []]
    compressed = [site for site in dct["sites"][0] if site["decision"] == "compressed"]
    assert compressed
    assert all(site["kind"] == "gradient" and site["wire_bytes"] < site["dense_bytes"] / 10 for site in compressed)


@pytest.mark.slow
def test_replicas_are_identical_at_every_step(both: tuple[dict[str, Any], str]) -> None:
    assert "identical (24 checks)" in both[1]


@pytest.mark.slow
def test_run_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "dct_train.py"
    script.write_text("from dct_compile.cli.main import main; main()")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "train"]
    size = ["--epochs", "1", "--seeds", "1", "--dp", "1", "--mp", "2", "--backend", "dense", "--out", str(tmp_path / "out")]
    # How the ranks start and meet is tested: eager mode spares them Inductor's code.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*command, *SMALL, *size], capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Quality and speed") == 1
    assert (tmp_path / "out" / "report.html").is_file()


def _train(folder: Path, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["train", *arguments, "--out", str(folder / "out")])
    assert result.exit_code == 0, result.output
    assert (folder / "out" / "report.html").is_file()
    metrics: dict[str, Any] = json.loads((folder / "out" / "metrics.json").read_text())
    return metrics


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts a small text in the place of the package."""
    folder = tmp_path / "shksprdata"
    (folder / "texts").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "texts" / "small_gut.txt").write_text("To be, or not to be, that is the question. " * 200)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "shksprdata", raising=False)
    shakespeare.cache_clear()
    yield
    shakespeare.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("text")
def test_a_gpt_learns_under_dct(tmp_path: Path) -> None:
    metrics = _train(tmp_path, "--model", "gpt", "--backend", "dct", "--steps", "12", "--seeds", "1", "--dp-density", "0.05")
    run = metrics["backends"][0]["runs"][0]
    assert run["losses"][0] == pytest.approx(math.log(256), abs=0.5)
    assert run["metrics"]["loss"] < run["losses"][0] - 0.1
    assert run["metrics"]["bits_per_byte"] == pytest.approx(run["metrics"]["loss"] / math.log(2))
    assert (metrics["settings"]["optimizer"], metrics["settings"]["betas"]) == ("adamw", [0.9, 0.95])
    assert "momentum" not in metrics["settings"]


@pytest.mark.slow
def test_a_resnet_trains_under_dct(tmp_path: Path) -> None:
    write_images(tmp_path, train=96, test=30)
    size = ["--batch-size", "16", "--epochs", "2", "--seeds", "1", "--fashion-mnist-path", str(tmp_path)]
    metrics = _train(tmp_path, "--model", "resnet", "--backend", "dct", *size)
    result = metrics["backends"][0]
    run = result["runs"][0]
    assert (run["steps"], run["replica_checks"]) == (12, 12)
    assert run["losses"][-1] < run["losses"][0]
    assert 0 <= run["metrics"]["accuracy"] <= 1
    assert {site["kind"] for site in result["sites"][0]} == {"gradient", "buffers"}
    # It counts for dense what is computed for it.
    assert sum(site["dense_bytes"] for site in result["sites"][0]) == pytest.approx(
        computed_bytes("dense", ResNet(), 2)[0][1], abs=len(result["sites"][0])
    )


@pytest.mark.slow
def test_hooks_of_torch_start_alike_and_send_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The hooks and what they send are tested: eager mode spares the ranks Inductor's code.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    write_images(tmp_path, train=64, test=12)
    size = ["--batch-size", "8", "--steps", "14", "--seeds", "2", "--fashion-mnist-path", str(tmp_path)]
    metrics = _train(tmp_path, "--model", "resnet", "--backend", "dense,fp16,powersgd-2", *size)
    dense, half, low_rank = metrics["backends"]
    for seed in range(2):
        losses = [result["runs"][seed]["losses"] for result in (dense, half, low_rank)]
        assert losses[1][0] == losses[2][0] == losses[0][0]
        # What PowerSGD keeps from another seed would change these steps: they are dense.
        assert losses[2][:10] == pytest.approx(losses[0][:10], rel=1e-4)
        assert losses[2][11:] != pytest.approx(losses[0][11:], rel=1e-4)
    assert [first for first, _ in low_rank["computed_bytes"]] == [1, 11]
    assert low_rank["computed_bytes"][1][1] < dense["computed_bytes"][0][1] / 5


def bytes_of_hooks(rank: int, world_size: int, backend: str) -> tuple[float, float]:
    """Returns the bytes that the hook's all_reduce calls carry at step 12, as a ring sends them, and the computed number."""
    mesh = make_mesh(world_size, 1)
    model = nn.Sequential(nn.Linear(40, 30), nn.Unflatten(1, (1, 5, 6)), nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(96, 3))
    compiled = compile_with(backend, model, mesh, {})
    carried: list[int] = []
    plain = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        carried.append(tensor.numel() * tensor.itemsize)
        return plain(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        patch.setattr(dist, "all_reduce", counted)
        for _ in range(12):
            carried.clear()
            compiled.module(torch.randn(4, 40)).sum().backward()
    return 2 * (world_size - 1) / world_size * sum(carried), computed_bytes(backend, model, world_size)[-1][1]


@pytest.mark.parametrize("backend", HOOKS)
def test_computed_bytes_are_those_of_the_hooks(ranks2: Ranks, backend: str) -> None:
    for carried, computed in ranks2(bytes_of_hooks, backend):
        assert carried == computed > 0
