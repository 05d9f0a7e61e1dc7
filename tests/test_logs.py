"""TORCH_LOGS and TORCH_TRACE, set before a process starts: a line per decision, and the site table as an artifact for tlparse."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch
from tests.small_models import Layers
from tests.tracing import Tracer, fake_group

with fake_group(4):
    Tracer().trace(Layers(exchanged=True), torch.randn(16, 64), data_parallel=True, exempt=["top.*"])
"""
GRADIENT = (
    "top.bias, top.weight, bottom.bias, bottom.weight: gradient all_reduce: compressed "
    "(owner, density 0.01; dense: top.bias, top.weight, bottom.bias), 37440 -> 13104 bytes"
)


def stderr_of(**environment: str) -> str:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def decisions(stderr: str) -> list[str]:
    """What follows a graph's name in the lines of this project's loggers."""
    return [line.partition(": ")[2] for line in stderr.splitlines() if re.search(r"passes/manager\.py:\d+\]", line)]


@pytest.mark.parametrize("setting", ["dct_compile", "+dct_compile"])
def test_torch_logs_prints_a_line_per_decision(setting: str) -> None:
    lines = decisions(stderr_of(TORCH_LOGS=setting))
    assert len(lines) == 3
    forward, backward, gradient = sorted(lines, key=lambda line: ("gradient" in line, "gradient all_reduce" in line))
    name = re.escape("small_models.py:") + r"\d+ in exchange: exchanged: Tensor = .*: "
    assert re.search(name + r"activation all_to_all_single: compressed \(row threshold, 4 of 64 kept\), 3072 -> 144 bytes$", forward)
    assert re.search(name + r"activation_gradient all_to_all_single: compressed \(the forward's mask, values only\), 3072 -> 96 ", backward)
    assert gradient.endswith(GRADIENT)


def artifacts(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Metadata and payload of every artifact: a payload is the lines behind its record, each after a tab."""
    (file,) = folder.glob("dedicated_log_torch_trace_*.log")
    found: list[tuple[dict[str, Any], list[str]]] = []
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            found[-1][1].append(line[1:])
        else:
            found.append((json.loads(line[line.index("{") :]), []))
    return [(record, "\n".join(payload)) for record, payload in found if "artifact" in record]


def test_torch_trace_holds_graphs_and_sites(tmp_path: Path) -> None:
    assert decisions(stderr_of(TORCH_TRACE=str(tmp_path))) == [], "nothing is logged unasked"
    own = [(record, payload) for record, payload in artifacts(tmp_path) if record["artifact"]["name"].startswith("dct_")]
    # The first attempt at the graph finds out which state it needs, and reports nothing.
    assert [record["artifact"] for record, _ in own] == [
        {"name": "dct_before", "encoding": "string"},
        {"name": "dct_after", "encoding": "string"},
        {"name": "dct_sites", "encoding": "json"},
    ]
    assert all((record["frame_id"], record["frame_compile_id"]) == (0, 0) for record, _ in own), "tlparse lists them with their graph"
    before, after, sites = (payload for _, payload in own)
    assert "dct.pack_rows" not in before
    assert "dct.pack_rows" in after
    table = json.loads(sites)
    assert [(site["kind"], site["decision"]) for site in table] == [
        ("activation", "compressed"),
        ("activation_gradient", "compressed"),
        ("gradient", "compressed"),
    ]
    assert (table[2]["dense_bytes"], table[2]["wire_bytes"], table[2]["shape"]) == (37440, 13104, [6240])
