"""Runs the C++ compiler so that an interrupted build leaves nothing behind that runs or that could be loaded.

Every compiler runs in a process group of its own, beside a watcher that reads from a pipe which this process holds open. When this process
ends, in whatever way, the pipe breaks and the watcher kills the group; `Compilation.cancel` breaks it on purpose. A Ctrl-C at the terminal
does not reach the group, so the compiler never reports an error of its own because of it.

Compilers begin with the lowest priority, because Inductor compiles a model's code meanwhile. They start anew with the ordinary one as soon
as somebody misses the library.
"""

import hashlib
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from dct_compile.triton_kernels.cpu.library_file import cpu_features

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden")
"""No -ffast-math, no fused products and sums: numbers mean what IEEE says, so that the kernels agree with the references to the bit."""

_POLL_S = 0.01
_GUARDED = """
exec 3<&0
"$@" </dev/null 3<&- &
compiler=$!
{ read -r line; kill -9 0; } <&3 &
watcher=$!
wait $compiler
status=$?
kill -9 $watcher
exit $status
"""


class CancelledError(Exception):
    """A build was cancelled: it says nothing about whether the library can be compiled."""


def compiler() -> list[str]:
    """Returns the command of the C++ compiler: ``CXX``, else g++. Raises OSError where ``CXX`` is no command."""
    named = os.environ.get("CXX", "")
    try:
        return shlex.split(named) or ["g++"]
    except ValueError as error:
        raise OSError(f"CXX is {named!r}, which is no command: {error}") from error


def compiler_name() -> str:
    """Returns a name for the compiler and this CPU, which differs where -march=native means something else.

    Raises:
        OSError: ``CXX`` is not the command of a program.
        subprocess.CalledProcessError: It is none of a compiler.
    """
    command = [*compiler(), "-march=native", "-###", "-E", "-x", "c++", os.devnull]
    try:
        resolved = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except OSError as error:
        raise OSError(f"the C++ compiler {shlex.join(compiler())} cannot be run: {error.strerror}") from error
    digest = hashlib.sha256(resolved.stderr)
    digest.update(shlex.join(compiler()).encode())
    digest.update(" ".join(sorted(cpu_features())).encode())
    return digest.hexdigest()[:16]


class Compilation:
    """The compilers of one build."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[_Compiler] = []
        self._cancelled = False
        self._priority: tuple[str, ...] = ("nice", "-n", "19")
        self._is_missed = False

    def compile(self, units: Sequence[Path], folder: Path) -> Path:
        """Compiles ``units`` side by side, and links them.

        Args:
            units: C++ files.
            folder: Where the files of the build go, the library among them.

        Returns:
            The library.

        Raises:
            subprocess.CalledProcessError: The compiler failed; ``stderr`` holds its words.
            CancelledError: `cancel` was called.
        """
        largest_first = sorted(units, key=lambda unit: unit.stat().st_size, reverse=True)
        objects = [folder / f"{unit.stem}.o" for unit in largest_first]
        self._run([([*FLAGS, "-c", str(unit)], target) for unit, target in zip(largest_first, objects, strict=True)])
        library = folder / "library.so"
        self._run([([*FLAGS, "-shared", *map(str, objects)], library)])
        return library

    def cancel(self) -> None:
        """Ends the compilers that run, and lets none start."""
        with self._lock:
            self._cancelled = True
            for running in self._running:
                running.end()

    def hurry(self) -> None:
        """Lets the compilers run with the ordinary priority from now on."""
        self._is_missed = True

    def check(self) -> None:
        """Raises CancelledError if `cancel` was called."""
        if self._cancelled:
            raise CancelledError

    def _run(self, steps: Sequence[tuple[list[str], Path]]) -> None:
        """Runs the compiler for each step, which is its arguments and the file that it makes: as many at a time as there are CPUs."""
        waiting = list(reversed(steps))
        try:
            while waiting or self._running:
                with self._lock:
                    self.check()
                    if self._is_missed and self._priority:
                        self._priority = ()
                        waiting.extend(running.restartable() for running in self._running)
                        self._running = []
                    while waiting and len(self._running) < _cpus():
                        self._running.append(_Compiler(self._priority, *waiting.pop()))
                    self._running = [running for running in self._running if not running.has_ended()]
                time.sleep(_POLL_S)
        finally:
            with self._lock:
                for running in self._running:
                    running.end()
                self._running = []


class _Compiler:
    """One process group: a compiler, what it starts, and the watcher."""

    def __init__(self, priority: Sequence[str], arguments: list[str], target: Path) -> None:
        self.arguments, self.target = arguments, target
        self.command = [*compiler(), *arguments, "-o", str(target)]
        self.errors = target.with_suffix(".err")
        with self.errors.open("wb") as stderr:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARDED, "sh", *priority, *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                process_group=0,  # not a session of its own: Linux shares the CPUs among sessions first, whatever their priorities
            )

    def has_ended(self) -> bool:
        """Raises subprocess.CalledProcessError if it failed."""
        status = self.process.poll()
        if status is None:
            return False
        self.end()
        if status != 0:
            raise subprocess.CalledProcessError(status, self.command, stderr=self.errors.read_bytes())
        return True

    def restartable(self) -> tuple[list[str], Path]:
        """Ends the group and returns what another compiler needs to do its work."""
        self.end()
        return self.arguments, self.target

    def end(self) -> None:
        """Lets the watcher end the group, if it runs, and waits for that."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
