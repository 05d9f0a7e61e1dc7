"""The study of codecs of activations runs, at a small scale: every cut and codec trains, and the codecs differ."""

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner

from dct_compile.cli.main import main


def test_every_cut_trains_with_every_codec(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    small = ["--steps", "2", "--seeds", "1", "--samples", "1500", "--rates", "0.01", "--results", str(results)]
    done = CliRunner().invoke(main, ["bench", "accuracy", *small])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("low rank, a quarter") == 2 * 7  # as it is made, and in the table
    with results.open(newline="") as file:
        losses = {(row["cut"], row["codec"], row["rate"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert len({cut for cut, *_ in losses}) == 7
    for cut, _, rate in [key for key in losses if key[1] == "dense"]:
        coded = [loss for (other, codec, same), loss in losses.items() if (other, same) == (cut, rate) and codec != "dense"]
        assert len(coded) == 7
        assert sum(loss != losses[cut, "dense", rate] for loss in coded) >= 6  # bfloat16 may be as good
        assert all(0 < loss < 8 for loss in coded)


@pytest.mark.parametrize(("option", "name"), [("--cuts", "pipelines"), ("--codecs", "int2")])
def test_unknown_names_are_refused(option: str, name: str) -> None:
    done = CliRunner().invoke(main, ["bench", "accuracy", option, name])
    assert done.exit_code == 2
    assert f"'{name}' is none of " in done.output
