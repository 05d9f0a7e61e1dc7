"""Versions of torch: the supported ones are the same everywhere, a newer one is a note, and looking uses up no compilations."""

import logging
import re
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from dct_compile.workarounds import torch_versions
from dct_compile.workarounds.recompiles import counted_apart
from tests.ranks import fresh_compiler

ROOT = Path(__file__).parent.parent
NOTE = "torch {version} is newer than 1.0, the newest version that this release of dct-compile was tested with"


def minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def bound_of_dependency(name: str) -> str:
    dependencies: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(text for text in dependencies if text.startswith(name)).removeprefix(name)


def test_one_range_of_versions_is_told_and_tested_everywhere() -> None:
    oldest = minor(bound_of_dependency("torch>="))
    supported = [(2, number) for number in range(oldest[1], torch_versions.NEWEST_TESTED[1] + 1)]
    listed = re.search(r"^VERSIONS \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    assert [minor(version) for version in listed[1].split()] == supported
    matrix = re.search(r"^ +torch: \[(.+)\]$", (ROOT / ".github" / "workflows" / "ci.yml").read_text(), re.MULTILINE)
    assert matrix is not None
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert [minor(version.strip(' "')) for version in matrix[1].split(",")] == [supported[0], minor(pinned[1]), supported[-1]]
    rows = re.findall(r"^\| (2\.\d+)", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    assert [minor(row) for row in rows] == supported


def test_a_newer_torch_is_one_note(
    group_of_one: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_versions, "NEWEST_TESTED", (1, 0))
    note = NOTE.format(version=torch.__version__)
    with fresh_compiler(), caplog.at_level(logging.WARNING, "dct_compile"):
        for size in (4, 8):
            torch.compile(nn.Linear(size, size), backend=dct)(torch.ones(2, size))
        assert dct_compile.report().notes.count(note) == 1
    assert [record.getMessage() for record in caplog.records].count(note) == 1


def test_the_tested_versions_have_no_note() -> None:
    assert minor(str(torch.__version__)) > torch_versions.NEWEST_TESTED or torch_versions.untested_version() is None


@pytest.mark.parametrize("version", ["2.15.0", "2.15.1+cpu", "2.16.0.dev20270101+cu132", "3.0.0a0+git1234"])
def test_development_versions_count_as_the_release_to_come(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_versions, "NEWEST_TESTED", (2, 15))
    monkeypatch.setattr(torch, "__version__", version)
    assert torch_versions.untested_version() == (None if version.startswith("2.15") else version)


def test_looking_leaves_the_users_compilations_alone() -> None:
    """As many as Dynamo allows one function: the user's own compilation behind them runs compiled."""
    limit, compiled = torch._dynamo.config.recompile_limit, []

    def function(x: Tensor) -> Tensor:
        return x.sin()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    with fresh_compiler():
        for _ in range(limit + 1):
            with counted_apart() as apart:
                torch.compile(function, backend=lambda graph, _: graph, **apart)(torch.ones(2))
        assert torch.equal(torch.compile(function, backend=backend)(torch.ones(2)), torch.ones(2).sin())
    assert len(compiled) == 1
