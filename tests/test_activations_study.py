"""The study of codecs of activations runs, at a small scale: every cut and codec trains, and the codecs differ."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "activations.py"


def test_every_cut_trains_with_every_codec(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    small = ["--steps", "2", "--seeds", "1", "--samples", "1500", "--results", str(results)]
    done = subprocess.run([sys.executable, str(SCRIPT), *small], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in results.read_text().splitlines()[1:]]
    losses = {(cut, codec, rate): float(loss) for cut, _, codec, rate, _, loss in rows}
    assert len({cut for cut, *_ in losses}) == 7
    for cut, _, rate in [key for key in losses if key[1] == "dense"]:
        coded = [loss for (other, codec, same), loss in losses.items() if (other, same) == (cut, rate) and codec != "dense"]
        assert len(coded) == 7
        assert losses[cut, "dense", rate] not in coded  # it has been sent by something
        assert all(0 < loss < 8 for loss in coded)
