"""The example of a pipeline runs as its first line says, learns, and sends about a quarter of the bytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.distributed
def test_the_example_learns_with_int8_rows() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/pipeline.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[0] > 4
    assert losses[-1] < 1
    assert [float(ratio) for ratio in re.findall(r"on the wire \(([\d.]+)x\)", done.stdout)] == [3.9, 3.9]
    assert done.stdout.count("int8 rows with stochastic rounding") == 2
