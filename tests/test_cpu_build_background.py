"""Operators and the library of the C++ kernels while it is built in the background."""

import time

import pytest
import torch

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.triton_kernels.cpu import build
from dct_compile.triton_kernels.layout import RowLayout
from tests.slow_compiler import Machine, until

pytestmark = pytest.mark.skipif(build.load_library() is None, reason="no C++ compiler")


def test_operators_do_not_wait_for_a_build_in_the_background(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gives the same bytes until the library is there."""
    ready = build.load_library()
    library = build._Library()
    monkeypatch.setattr(build, "_LIBRARY", library)
    machine.setenv("SECONDS_PER_STEP", "30")
    build.prebuild()
    until(machine.steps)
    rows, layout = torch.randn(8, 64), RowLayout((64,), 4, torch.bfloat16)
    before = time.monotonic()
    assert not build.is_ready()
    early = torch.ops.dct.pack_rows(rows, layout, "exact", 0.05, 0.0)
    assert time.monotonic() - before < 20
    assert library._build is not None
    library._build.compilation.cancel()
    library._build.join()
    finished = build._Library()
    finished._build = build._Build()
    finished._build.library, finished._build.is_done = ready, True
    monkeypatch.setattr(build, "_LIBRARY", finished)
    assert build.is_ready()
    assert torch.equal(torch.ops.dct.pack_rows(rows, layout, "exact", 0.05, 0.0), early)


def test_operators_wait_where_nobody_has_started_a_build(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_LIBRARY", build._Library())
    assert build.is_ready()
    assert machine.steps() == ["compile", "link"]
