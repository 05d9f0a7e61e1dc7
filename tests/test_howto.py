"""The scripts of docs/howto run as they stand: they learn, and their gradients travel compressed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EVALUATED = """
import torch
import torch.distributed as dist
from torch import Tensor, nn

{code}

class Even(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([-inputs, inputs], dim=1)

dist.init_process_group("gloo")
found = accuracy(torch.compile(Even(), backend="dct"), torch.tensor([-1.0, 1.0, 2.0, 3.0]), torch.tensor([0, 1, 1, dist.get_rank()]))
print(f"accuracy {{found}}")
dist.destroy_process_group()
"""


def code_of(page: str) -> str:
    """Returns the first block of Python of a page of docs/howto."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "howto" / f"{page}.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def run(code: str, folder: Path, *arguments: str) -> str:
    """Runs ``code`` on two ranks, and returns what they print."""
    script = folder / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("page", "ratio"), [("cpu-hosts", 100), ("gpu-machines", 45), ("fsdp", 3.5)])
def test_a_script_learns_and_sends_little(page: str, ratio: float, tmp_path: Path) -> None:
    printed = run(code_of(page), tmp_path, "1Gbit/s")
    losses = [float(text) for text in re.findall(r"loss (\d\.\d+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < 0.6 * losses[0]
    (found,) = re.findall(r"on the wire \((\d+\.\d)x\)", printed)
    assert float(found) > ratio


def test_the_evaluation_adds_up_over_the_ranks(tmp_path: Path) -> None:
    printed = run(EVALUATED.format(code=code_of("evaluation")), tmp_path)
    assert printed.count("accuracy 0.875") == 2
