"""The examples of sharded training run as users start them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
EXAMPLES = Path(__file__).parent.parent / "examples"


ROWS = {"fsdp2": {"parameter", "sharded_gradient"}, "hsdp": {"parameter", "sharded_gradient", "gradient"}}
"""The kinds of collectives that each example sends."""


@pytest.mark.parametrize(("name", "ranks"), [("fsdp2", 2), ("hsdp", 4)])
def test_example_learns_and_compresses(name: str, ranks: int) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < losses[0] / 1.5
    assert ROWS[name] <= set(re.findall(r"\w+", done.stdout))
    (sums,) = re.findall(r"per rank and step: (\d+) bytes dense, (\d+) on the wire", done.stdout)
    assert int(sums[0]) > 3 * int(sums[1])
