"""``dct train`` on real ranks: whole runs, and what finds a replica that differs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from dct_compile.cli.main import main
from dct_compile.cli.replicas import ReplicaMismatch, check_replicas
from dct_compile.models.dlrm import DLRM
from dct_compile.models.parallel import Table, make_mesh
from tests.processes import ROOT
from tests.rank_pool import Ranks

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
    size = ["--seeds", "2", "--epochs", "2", "--dp", "2", "--mp", "1", "--dp-density", "0.05"]
    result = CliRunner().invoke(main, ["train", *SMALL, *size, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "metrics.json").read_text()), result.output


@pytest.mark.slow
def test_options_are_in_the_results(both: tuple[dict[str, Any], str]) -> None:
    assert both[0]["settings"]["options"] == {"dp_density": 0.05}


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
