"""The examples of docs/recommenders.md run as they are: they learn, embeddings and gradients travel compressed, and the report says so."""

import os
import re
import subprocess
import sys

import pytest

from tests.processes import ROOT

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(("example", "package"), [("dlrm_all_to_all", "torch"), ("torchrec_dlrm", "torchrec")])
def test_an_example_learns_and_sends_little(example: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'dct-compile[recommenders]'")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"examples/{example}.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(text) for text in re.findall(r"loss (\d\.\d+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    (ratio,) = re.findall(r"on the wire \((\d+\.\d)x\)", done.stdout)
    assert float(ratio) > 100
    (counts,) = re.findall(r"has encoded (\d+) tensors outside of graphs, (\d+) bytes as (\d+) bytes", done.stdout)
    tensors, before, after = map(int, counts)
    assert tensors == 2 * 101
    assert 3.5 < before / after < 4
