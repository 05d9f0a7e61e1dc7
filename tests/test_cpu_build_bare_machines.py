"""The library of the C++ kernels on machines that cannot build it, or only somewhere else than they were told."""

import errno
import pwd
from pathlib import Path
from typing import Any

import pytest

from dct_compile.triton_kernels.cpu import build, library_file
from tests.processes import run_python
from tests.slow_compiler import Machine

pytestmark = pytest.mark.skipif(build.load_library() is None, reason="no C++ compiler")

WARNING = "the CPU kernels could not be compiled, the slower PyTorch reference is used instead: "


def load() -> Any:
    """As a new process would."""
    return build._Library().wait()


def no_compiler(kind: str, folder: Path) -> tuple[str, str]:
    """Returns a ``CXX`` that runs no compiler, and what is said of it."""
    plain, failing = folder / "plain", folder / "failing"
    plain.touch()
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    return {
        "missing": ("no-such-compiler", "the C++ compiler no-such-compiler cannot be run: No such file or directory"),
        "wrapped": ("no-such-cache g++", "the C++ compiler no-such-cache g++ cannot be run: No such file or directory"),
        "unbalanced": ("'unbalanced", 'CXX is "\'unbalanced", which is no command: No closing quotation'),
        "folder": (str(folder), f"the C++ compiler {folder} cannot be run: Permission denied"),
        "not executable": (str(plain), f"the C++ compiler {plain} cannot be run: Permission denied"),
        "failing": (str(failing), "returned non-zero exit status 1"),
    }[kind]


KINDS = ("missing", "wrapped", "unbalanced", "folder", "not executable", "failing")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler_the_library_that_is_there_is_used(
    kind: str, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An image of a container is often built with a compiler and run without one."""
    built = load()
    machine.setenv("CXX", no_compiler(kind, tmp_path)[0])
    found = load()
    assert found is not None
    assert found._name == built._name
    assert machine.steps() == ["compile", "link"]
    assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS)
def test_without_compiler_and_library_the_reason_is_said(
    kind: str, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command, reason = no_compiler(kind, tmp_path)
    machine.setenv("CXX", command)
    assert load() is None
    (record,) = caplog.records
    assert record.getMessage().startswith(WARNING)
    assert record.getMessage().endswith(f"{reason}." if kind == "failing" else reason)


OPERATOR = """
import torch
import dct_compile.ops
from dct_compile.triton_kernels.cpu import build
from dct_compile.triton_kernels.layout import RowLayout
build.prebuild()
layout = RowLayout((4,), 1, torch.float32)
payload = torch.ops.dct.pack_rows(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), layout, "exact", 0.25, 0.0)
print(torch.ops.dct.unpack_rows(payload, layout, 1, torch.float32).tolist(), build.load_library())
"""


@pytest.mark.parametrize("command", ["'unbalanced", " ", "/"])
def test_operators_run_whatever_the_compiler_is_said_to_be(command: str, tmp_path: Path) -> None:
    done = run_python(OPERATOR, CXX=command, DCT_COMPILE_CACHE_DIR=str(tmp_path), TMPDIR=str(tmp_path))
    values, _, library = done.stdout.strip().rpartition(" None") if command.strip() else done.stdout.partition(" <CDLL")
    assert values == "[[0.0, -3.0, 0.0, 0.0]]"
    assert done.stderr.count("could not be compiled") == (1 if command.strip() else 0)
    assert bool(library) == (not command.strip())


INDUCTOR = """
import torch
from tests.tracing import fake_group
with fake_group(2):
    layer = torch.compile(torch.nn.Linear(64, 64), backend="dct", options={"data_parallel": True})
    try:
        layer(torch.ones(4, 64)).sum().backward()
    except Exception as error:
        print(type(error.__cause__ or error).__name__, error)
"""


def test_what_torch_says_of_a_missing_compiler_is_not_hidden(tmp_path: Path) -> None:
    """Inductor itself needs one on a CPU."""
    own = {"DCT_COMPILE_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = run_python(INDUCTOR, CXX="no-such-compiler", **own)
    assert "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'no-such-compiler')" in done.stdout


def test_a_compiler_behind_a_wrapper(machine: Machine) -> None:
    machine.setenv("CXX", f"env {machine.steps_file.with_name('slow-compiler')}")
    assert load() is not None
    assert machine.steps() == ["compile", "link"]


def test_a_library_of_another_cpu_is_not_used(machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Its instructions would end the process."""
    here = library_file.cpu_features()
    monkeypatch.setattr(library_file, "cpu_features", lambda: here | {"avx8192", "amx9"})
    built = load()
    assert built is not None
    monkeypatch.setattr(library_file, "cpu_features", lambda: here)
    machine.setenv("CXX", "no-such-compiler")
    assert load() is None
    assert caplog.records[0].getMessage().endswith(f"; {built._name} is for a CPU with amx9, avx8192, which this one lacks")


def test_a_library_of_a_lesser_cpu_is_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = library_file.cpu_features()
    built = load()
    monkeypatch.setattr(library_file, "cpu_features", lambda: here | {"avx8192"})
    machine.setenv("CXX", "no-such-compiler")
    found = load()
    assert found is not None
    assert found._name == built._name


def test_machines_with_different_cpus_share_a_folder(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    here = library_file.cpu_features()
    for features in (here, here | {"avx8192"}, here):
        for module in ("library_file", "compiler"):
            monkeypatch.setattr(f"dct_compile.triton_kernels.cpu.{module}.cpu_features", lambda features=features: features)
        assert load() is not None
    assert machine.steps() == ["compile", "link"] * 2
    assert machine.files() == ["lock", "lock", "so", "so"]


def test_this_cpu_has_features() -> None:
    features = library_file.cpu_features()
    assert len(features) > 1
    assert all(feature.strip() == feature != "" for feature in features)


def test_a_damaged_library_is_not_used_without_a_compiler(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    assert load() is not None
    (file,) = machine.folder.glob("*.so")
    content = file.read_bytes()
    file.unlink()  # this process has mapped it, and would be killed by a bus error at its end
    file.write_bytes(content[:5000])
    machine.setenv("CXX", "no-such-compiler")
    assert load() is None
    assert caplog.records[0].getMessage().endswith(f"No such file or directory; {file} is damaged")


def test_two_processes_build_at_once(machine: Machine) -> None:
    machine.setenv("SECONDS_PER_STEP", "1")
    processes = [machine.start() for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 2
    assert machine.steps() == ["compile", "link"], "one of them has waited"
    assert machine.files() == ["lock", "so"]


@pytest.mark.parametrize("when", ["compiling", "writing"])
def test_a_full_disk_is_left_for_another(when: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    if when == "compiling":
        script = machine.steps_file.with_name("slow-compiler")
        full = f'case "$*" in *{machine.folder}*) echo "error: No space left on device" >&2; exit 1 ;; esac'
        script.write_text(script.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{full}"))
    else:
        seal = build.seal

        def fails_there(file: Path) -> None:
            if file.is_relative_to(machine.folder):
                raise OSError(errno.ENOSPC, "No space left on device")
            seal(file)

        monkeypatch.setattr(build, "seal", fails_there)
    assert load() is not None
    assert machine.files() == ["lock"]
    assert len(list(machine.torch_folder.glob("kernels-*.so"))) == 1


def test_a_user_without_a_home(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number that no user has."""

    def nobody(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("DCT_COMPILE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert load() is not None
    assert len(list(machine.torch_folder.glob("kernels-*.so"))) == 1
