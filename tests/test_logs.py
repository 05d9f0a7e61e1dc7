"""TORCH_LOGS and TORCH_TRACE, set before a process starts: a line per decision, and the site table as an artifact for tlparse."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_python

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


@pytest.fixture(scope="module")
def trace_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def stderr(trace_folder: Path) -> dict[str, str]:
    """Returns what is printed, by the setting of TORCH_LOGS; without one, TORCH_TRACE is set."""
    settings = {"dct_compile": {"TORCH_LOGS": "dct_compile"}, "+dct_compile": {"TORCH_LOGS": "+dct_compile"}}
    environments = {**settings, "": {"TORCH_TRACE": str(trace_folder)}}
    with ThreadPoolExecutor() as pool:  # each waits for a process of its own
        done = pool.map(lambda environment: run_python(SCRIPT, **environment), environments.values())
        return dict(zip(environments, (process.stderr for process in done), strict=True))


def decisions(stderr: str) -> list[str]:
    """Returns what follows a graph's name in the lines of this project's loggers."""
    return [line.partition(": ")[2] for line in stderr.splitlines() if re.search(r"passes/manager\.py:\d+\]", line)]


@pytest.mark.parametrize("setting", ["dct_compile", "+dct_compile"])
def test_torch_logs_prints_a_line_per_decision(stderr: dict[str, str], setting: str) -> None:
    lines = decisions(stderr[setting])
    assert len(lines) == 3
    forward, backward, gradient = sorted(lines, key=lambda line: ("gradient" in line, "gradient all_reduce" in line))
    name = re.escape("small_models.py:") + r"\d+ in exchange: exchanged: Tensor = .*: "
    assert re.search(name + r"activation all_to_all_single: compressed \(row threshold, 4 of 64 kept\), 3072 -> 144 bytes$", forward)
    assert re.search(name + r"activation_gradient all_to_all_single: compressed \(the forward's mask, values only\), 3072 -> 96 ", backward)
    assert gradient.endswith(GRADIENT)


def artifacts(folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Returns metadata and payload of every artifact: a payload is the lines behind its record, each after a tab."""
    (file,) = folder.glob("dedicated_log_torch_trace_*.log")
    found: list[tuple[dict[str, Any], list[str]]] = []
    for line in file.read_text().splitlines():
        if line.startswith("\t"):
            found[-1][1].append(line[1:])
        else:
            found.append((json.loads(line[line.index("{") :]), []))
    return [(record, "\n".join(payload)) for record, payload in found if "artifact" in record]


@pytest.fixture(scope="module")
def own_artifacts(stderr: dict[str, str], trace_folder: Path) -> list[tuple[dict[str, Any], str]]:
    return [(record, payload) for record, payload in artifacts(trace_folder) if record["artifact"]["name"].startswith("dct_")]


def test_nothing_is_logged_unasked(stderr: dict[str, str]) -> None:
    assert decisions(stderr[""]) == []


def test_torch_trace_holds_graphs_and_sites_once(own_artifacts: list[tuple[dict[str, Any], str]]) -> None:
    """The first attempt at the graph finds out which state it needs, and reports nothing."""
    assert [record["artifact"] for record, _ in own_artifacts] == [
        {"name": "dct_before", "encoding": "string"},
        {"name": "dct_after", "encoding": "string"},
        {"name": "dct_sites", "encoding": "json"},
    ]


def test_tlparse_lists_artifacts_with_their_graph(own_artifacts: list[tuple[dict[str, Any], str]]) -> None:
    assert all((record["frame_id"], record["frame_compile_id"]) == (0, 0) for record, _ in own_artifacts)


def test_graphs_in_the_trace_are_those_before_and_after_the_passes(own_artifacts: list[tuple[dict[str, Any], str]]) -> None:
    before, after, _ = (payload for _, payload in own_artifacts)
    assert "dct.pack_rows" not in before
    assert "dct.pack_rows" in after


def test_sites_in_the_trace_are_a_table(own_artifacts: list[tuple[dict[str, Any], str]]) -> None:
    table = json.loads(own_artifacts[2][1])
    assert [(site["kind"], site["decision"]) for site in table] == [
        ("activation", "compressed"),
        ("activation_gradient", "compressed"),
        ("gradient", "compressed"),
    ]
    assert (table[2]["dense_bytes"], table[2]["wire_bytes"], table[2]["shape"]) == (37440, 13104, [6240])
