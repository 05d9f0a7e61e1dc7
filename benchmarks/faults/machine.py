"""The machine: full and read-only disks, two builds at once, payloads of random bytes against guard pages."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from faults.ranks import ROOT, caches_in
from faults.row import Row, check

BUILD_S = 600.0
_TRAINED = """
from dct_compile.triton_kernels.cpu import build
if __name__ == "__main__":
    build.load_library()
    from faults.ranks import results, run
    from faults.peers import trained
    print(*results(run(2, trained, "compile(DDP)", "")))
"""
_BUILT = "from dct_compile.triton_kernels.cpu import build; print(build.load_library()._name)"
_FUZZED = "import faulthandler; faulthandler.enable(); from tests.damaged_payloads import main; main()"


def _start(code: str, mount: str = "", **environment: str) -> subprocess.Popen[str]:
    """Starts Python in the source tree; ``mount`` is a shell command that runs before, in a mount namespace of its own."""
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks"))), **environment}
    command = [sys.executable, "-c", code]
    if mount:
        command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh", *command]
    return subprocess.Popen(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _output(process: subprocess.Popen[str]) -> list[str]:
    printed, errors = process.communicate(timeout=BUILD_S)
    check(process.returncode == 0, f"exit code {process.returncode}: {errors[-500:]}")
    return printed.split()


def disk(options: str, folder: Path) -> str:
    """Trains where the caches are on a file system with ``options``, and where they are as ever."""
    usual = _output(_start(_TRAINED))
    cache = folder / "cache"
    cache.mkdir()
    mount = f"mount -t tmpfs -o {options} none {cache}"
    found = _output(_start(_TRAINED, mount, **caches_in(folder, cache)))
    check(found == usual, f"{found} instead of {usual}")
    return "so"


def two_builds(folder: Path) -> str:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler here"
    processes = [_start(_BUILT, **caches_in(folder, folder)) for _ in range(2)]
    paths = {line for process in processes for line in _output(process)}
    libraries = list(folder.rglob("*.so"))
    check(len(paths) == 1 and len(libraries) == 1, f"{paths}, {libraries}")
    return "so"


def fuzzed(folder: Path) -> str:
    return f"so for {', '.join(_output(_start(_FUZZED, TRITON_INTERPRET='1')))}"


_USUAL = "the training goes on, with the parameters of one with usual caches, bit for bit"
ROWS = (
    Row("a full disk for the kernels", "a tmpfs of 64 KiB as DCT_COMPILE_CACHE_DIR (Linux)", _USUAL, 2, partial(disk, "size=64k")),
    Row("a read-only disk for the kernels", "a read-only tmpfs as DCT_COMPILE_CACHE_DIR (Linux)", _USUAL, 2, partial(disk, "ro")),
    Row(
        "two builds of the C++ kernels at once",
        "two processes with the same empty folder",
        "both load the one library that is there in the end",
        1,
        two_builds,
    ),
    Row(
        "payloads of random bytes",
        "random, large and slightly changed bytes for every decoder, before a page that nobody may touch",
        "no decoder reads or writes memory that is not its own",
        1,
        fuzzed,
    ),
)
