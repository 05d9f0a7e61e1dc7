"""The library of the C++ kernels: where it lies, and that no interruption leaves a broken one, a compiler or a false warning behind."""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.triton_kernels.cpu import build
from tests.slow_compiler import Machine, until

pytestmark = pytest.mark.skipif(build.load_library() is None, reason="no C++ compiler")


def load() -> object:
    """As a new process would."""
    return build._Library().wait()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"DCT_COMPILE_CACHE_DIR": "chosen", "XDG_CACHE_HOME": "caches", "HOME": "home"}, "chosen"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "home"}, "caches/dct_compile"),
        ({"HOME": "home"}, "home/.cache/dct_compile"),
        ({"DCT_COMPILE_CACHE_DIR": "a file/below"}, "torch/dct_compile"),
        ({"HOME": "a file/below"}, "torch/dct_compile"),
    ],
)
def test_the_folder_of_the_library(
    variables: dict[str, str], folder: str, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr(build, "default_cache_dir", lambda: str(tmp_path / "torch"))
    for name in ("DCT_COMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert load() is not None
    assert len(list((tmp_path / folder).glob("kernels-*.so"))) == 1


def test_it_is_built_once(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also by processes that start together, and whatever Inductor's cache folder is."""
    machine.setenv("SECONDS_PER_STEP", "0.3")
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    assert load() is not None
    assert machine.steps() == ["compile", "link"]
    assert machine.files() == ["lock", "so"]


def test_no_compiler_begins_twice_for_one_who_waits(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However soon the first one runs."""
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        original(thread)
        until(machine.steps)

    monkeypatch.setattr(threading.Thread, "start", start)
    machine.setenv("SECONDS_PER_STEP", "1")
    assert load() is not None
    assert machine.steps() == ["compile", "link"]


def test_it_is_built_in_the_background(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_LIBRARY", build._Library())
    machine.setenv("SECONDS_PER_STEP", "1")
    before = time.monotonic()
    for _ in range(3):
        build.prebuild()
    assert time.monotonic() - before < 0.5
    until(machine.steps)
    library = build.load_library()
    assert time.monotonic() - before >= 2
    assert library is not None
    assert build.load_library() is library
    assert machine.steps() == ["compile", "compile", "link"], "once with the lowest priority, and anew when it is missed"


@pytest.mark.parametrize("damage", ["empty", "half", "a byte", "no library"])
def test_a_damaged_file_is_replaced(damage: str, machine: Machine) -> None:
    assert load() is not None
    (file,) = machine.folder.glob("*.so")
    content = file.read_bytes()
    changed = bytes([content[0] ^ 1]) + content[1:]
    file.unlink()  # this process has mapped it, and would be killed by a bus error at its end
    file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "a byte": changed, "no library": b"text" * 100}[damage])
    assert load() is not None
    assert file.read_bytes() == content
    assert machine.steps() == ["compile", "link"] * 2


def test_a_compiler_that_fails_is_said(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    failing = machine.steps_file.with_name("failing-compiler")
    failing.write_text('#!/bin/sh\ncase "$*" in *-###*) exit 0 ;; esac\necho "no such header" >&2\nexit 3\n')
    failing.chmod(0o755)
    machine.setenv("CXX", str(failing))
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert [record.getMessage() for record in caplog.records] == [
        "the CPU kernels could not be compiled, the slower PyTorch reference is used instead: no such header"
    ]
    assert machine.files() == ["lock"]


def test_the_leavings_of_dead_builds_are_removed(machine: Machine) -> None:
    """But not the files of another version that is being built."""
    machine.folder.mkdir()
    (machine.folder / "kernels-dead.building-1").mkdir()
    (machine.folder / "kernels-dead.building-1" / "library.so").touch()
    (machine.folder / "kernels-live.building-1").mkdir()
    with build._lock("kernels-live", machine.folder, 0):
        assert load() is not None
    assert [path.name for path in machine.folder.glob("*.building-*")] == ["kernels-live.building-1"]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["compile", "link"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build(number: signal.Signals, step: str, machine: Machine) -> None:
    machine.setenv("SECONDS_PER_STEP" if step == "compile" else "SECONDS_TO_LINK", "60")
    process = machine.start()
    until(lambda: step in machine.steps())
    process.send_signal(number)
    output, errors = process.communicate()
    # Where torch._dynamo is imported, Python ends with 1 after an interrupt instead of the signal.
    assert process.returncode in ((-number, 1) if number == signal.SIGINT else (-number,)), errors
    assert output == ""
    assert "could not be compiled" not in errors
    until(lambda: not machine.processes())
    assert "so" not in machine.files()
    machine.setenv("SECONDS_PER_STEP", "0")
    machine.setenv("SECONDS_TO_LINK", "0")
    assert load() is not None
    assert machine.files() == ["lock", "so"]


KILLED_BEFORE = "build.shutil.rmtree = lambda *_, **__: os._exit(0)"
KILLED_AFTER = """
replace = os.replace
def replace_and_end(source, target):
    replace(source, target)
    if str(target).endswith(".so"):
        os._exit(0)
os.replace = replace_and_end
"""


@pytest.mark.parametrize("killed", [KILLED_BEFORE, KILLED_AFTER], ids=["before the folder goes", "after the last rename"])
def test_a_build_that_is_killed_at_its_end(killed: str, machine: Machine) -> None:
    """The next process takes a library that is there as it is, and looks at nothing else."""
    machine.start(f"import os\n{killed}\nbuild.load_library()").communicate()
    assert load() is not None
    assert machine.files() == ["lock", "so"]


def test_a_compiler_that_is_about_to_end_leaves_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    left = machine.folder / "kernels-dead.building-1"
    left.mkdir(parents=True)
    original = os.rmdir

    def rmdir(path: Any, **choice: Any) -> None:
        with suppress(OSError):
            (left / "unit.o").touch()
        original(path, **choice)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert load() is not None
    assert not left.exists()
    assert machine.files().count("building") == 0


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_a_build_that_is_killed_at_any_moment(seconds: float, machine: Machine) -> None:
    process = machine.start("from dct_compile.triton_kernels.cpu.build import load_library\nprint('now', flush=True)\nload_library()")
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert load() is not None
    assert machine.files() == ["lock", "so"]


@pytest.mark.slow
def test_an_interruption_is_no_failure(machine: Machine) -> None:
    """A process that survives it, such as a notebook, builds anew at the next call."""
    code = """
import os
from dct_compile.triton_kernels.cpu.build import load_library
try:
    load_library()
except KeyboardInterrupt:
    os.environ["SECONDS_PER_STEP"] = "0"
    print("interrupted", load_library() is not None)
"""
    machine.setenv("SECONDS_PER_STEP", "60")
    process = machine.start(code)
    until(machine.steps)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert output.split() == ["interrupted", "True"], errors
    assert "could not be compiled" not in errors
    assert machine.processes() == []
