"""Compile the C++ kernels of this folder on first use, keep the library in torch's cache folder, load it with ctypes.

A machine without a C++ compiler is supported: `load_library` returns None, says so once, and callers use the PyTorch references.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

logger = logging.getLogger("dct_compile.ops")

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden")
"""No -ffast-math, no fused products and sums: numbers mean what IEEE says, so that the kernels agree with the references to the bit."""


LOCK_TIMEOUT_S = 600


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def _sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))


def _digest() -> str:
    """Names the library by all that decides its contents: sources, flags, and what -march=native means to this compiler on this CPU."""
    resolved = subprocess.run([*_compiler(), "-march=native", "-###", "-E", "-x", "c++", os.devnull], capture_output=True, check=True)
    digest = hashlib.sha256(resolved.stderr)
    digest.update(shlex.join([*_compiler(), *FLAGS]).encode())
    for source in _sources():
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _folder() -> Path:
    root = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    return Path(root).absolute() / "dct_compile"


def _compile(target: Path) -> None:
    """Build into a file of our own and rename it: nobody ever loads half a library."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        units = [str(path) for path in _sources() if path.suffix == ".cpp"]
        subprocess.run([*_compiler(), *FLAGS, *units, "-o", name], capture_output=True, check=True)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


@cache
def load_library() -> ctypes.CDLL | None:
    """The library of all C++ kernels, or None (after one warning) where it cannot be built or loaded.

    The first call on a machine compiles for some seconds; later processes load the cached file. Calls through the returned object
    release the GIL. ``CXX`` selects the compiler, ``TORCHINDUCTOR_CACHE_DIR`` moves the cache.
    """
    try:
        target = _folder() / f"kernels-{_digest()}.so"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            # The ranks of a machine start together: one compiles, the others wait for it.
            with FileLock(target.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
                if not target.exists():
                    _compile(target)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
    except OSError as error:
        reason = str(error)
    logger.warning("the CPU kernels could not be compiled, the slower PyTorch reference is used instead: %s", reason)
    return None
