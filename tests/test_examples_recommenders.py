"""The examples of docs/recommenders.md: they learn, embeddings and gradients travel compressed, and the report says so."""

import os
import re
import subprocess
import sys

import pytest

from dct_compile.options import DENSE
from tests.processes import ROOT
from tests.rank_pool import Ranks
from tests.ranks_examples import HEADERS, STEPS, trained

pytestmark = pytest.mark.distributed


def encoded(text: str) -> tuple[int, int, int]:
    """Returns what a report says of tensors that were encoded outside of graphs: their number, and the bytes before and after."""
    (counts,) = re.findall(r"has encoded (\d+) tensors outside of graphs, (\d+) bytes as (\d+) bytes", text)
    tensors, before, after = map(int, counts)
    return tensors, before, after


def test_the_reference_dlrm_learns_and_sends_little(ranks2: Ranks) -> None:
    dense, compressed = (ranks2(trained, "dlrm_all_to_all", options) for options in (DENSE, {}))
    assert compressed[0].loss < dense[0].loss + 0.02
    for rank in compressed:
        assert rank.dense > 100 * rank.wire
        tensors, before, after = encoded(rank.report)
        assert tensors == 2 * STEPS
        assert 3.5 < before / after < 4
        expected = STEPS * rank.wire + after / 2  # one of two shares stays here
        once = rank.dense  # DDP's broadcast of the parameters at the start
        assert expected < rank.measured < expected + STEPS * HEADERS * (rank.messages + 2) + 1.1 * once
    copies = [{name: value for name, value in rank.copies.items() if not name.startswith("tables")} for rank in compressed]
    assert all(copies[0][name].equal(copies[1][name]) for name in copies[0])


def test_torchrecs_dlrm_learns_and_sends_little() -> None:
    pytest.importorskip("torchrec", reason="torchrec is not installed: pip install 'dct-compile[recommenders]'")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/torchrec_dlrm.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(text) for text in re.findall(r"loss (\d\.\d+)", done.stdout)]
    assert len(losses) == 3
    assert losses[-1] < 0.9 * losses[0]
    (ratio,) = re.findall(r"on the wire \((\d+\.\d)x\)", done.stdout)
    assert float(ratio) > 100
    tensors, before, after = encoded(done.stdout)
    assert tensors == 2 * 101
    assert 3.5 < before / after < 4
