"""The study of codecs of activations runs, at a small scale: every cut and codec trains, and the codecs differ."""

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "activations.py"


def test_every_cut_trains_with_every_codec(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    small = ["--steps", "2", "--seeds", "1", "--samples", "1500", "--rates", "0.01", "--results", str(results)]
    done = subprocess.run([sys.executable, str(SCRIPT), *small], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    with results.open(newline="") as file:
        losses = {(row["cut"], row["codec"], row["rate"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert len({cut for cut, *_ in losses}) == 7
    for cut, _, rate in [key for key in losses if key[1] == "dense"]:
        coded = [loss for (other, codec, same), loss in losses.items() if (other, same) == (cut, rate) and codec != "dense"]
        assert len(coded) == 7
        assert sum(loss != losses[cut, "dense", rate] for loss in coded) >= 6  # bfloat16 may be as good
        assert all(0 < loss < 8 for loss in coded)
