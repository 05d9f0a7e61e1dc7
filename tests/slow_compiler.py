"""A machine whose C++ compiler is as slow as wanted, for tests of how the library of kernels is built."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dct_compile.triton_kernels.cpu import build

COMPILER = """#!/bin/sh
for last; do :; done
case "$*" in *-###*) echo "a compiler" >&2; exit 0 ;; esac
echo $$ >> "$STEPS.pids"
case "$*" in
  *-shared*) step=link seconds=${SECONDS_TO_LINK:-$SECONDS_PER_STEP} ;;
  *) step=compile seconds=$SECONDS_PER_STEP ;;
esac
echo $step >> "$STEPS"
sleep "$seconds" &
echo $! >> "$STEPS.pids"
wait $!
case "$*" in
  *-shared*) exec g++ -shared -x c++ /dev/null -o "$last" ;;
  *) : > "$last" ;;
esac
"""
LOAD = "from dct_compile.triton_kernels.cpu.build import load_library; print(load_library() is not None)"
ONE_UNIT = f"""
import signal
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore Ctrl-C
from dct_compile.triton_kernels.cpu import build
build._sources = lambda: [Path({build.__file__!r}).with_name("repack.cpp")]
"""


class Machine:
    """A folder for libraries, and a compiler that is as slow as wanted and writes down what it does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.steps_file = folder / "cache", folder / "steps"
        self.torch_folder = folder / "torch" / "dct_compile"
        self.steps_file.touch()
        script = folder / "slow-compiler"
        script.write_text(COMPILER)
        script.chmod(0o755)
        self.setenv = monkeypatch.setenv
        for name, value in {"CXX": script, "STEPS": self.steps_file, "SECONDS_PER_STEP": 0, "DCT_COMPILE_CACHE_DIR": self.folder}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(build, "default_cache_dir", lambda: str(self.torch_folder.parent))
        self._builds: list[build._Build] = []
        monkeypatch.setattr(build, "_Build", self._new_build(build._Build))
        # One unit, so that a step takes as long as it is told.
        monkeypatch.setattr(build, "_sources", lambda: [Path(build.__file__).with_name("repack.cpp")])

    def _new_build(self, kind: type[build._Build]) -> Callable[[], build._Build]:
        def make() -> build._Build:
            self._builds.append(kind())
            return self._builds[-1]

        return make

    def end_builds(self) -> None:
        """Ends the builds in the background: one that goes on would run the compiler of the next test, and write down its steps there."""
        for made in self._builds:
            made.compilation.cancel()
            if made.is_alive():
                made.join()

    def steps(self) -> list[str]:
        return self.steps_file.read_text().split()

    def processes(self) -> list[int]:
        """Compilers, and what they started, that still run."""
        pids = Path(f"{self.steps_file}.pids").read_text().split()
        return [int(pid) for pid in pids if Path("/proc", pid).exists() and "State:\tZ" not in Path("/proc", pid, "status").read_text()]

    def files(self) -> list[str]:
        """Kinds of the files in the folder."""
        return sorted(path.name.split(".", 1)[1].split("-")[0] for path in self.folder.iterdir())

    def start(self, code: str = LOAD) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", ONE_UNIT + code]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)
