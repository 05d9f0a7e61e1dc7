"""Compiles the C++ kernels of this folder once per machine and version, and loads them with ctypes.

A machine without a C++ compiler is supported: it uses a library that was built before, as in an image of a container. Without one
`load_library` returns None, after one warning, and callers use the PyTorch references.

The library is a file in the user's cache folder. The first half of its name is a digest of the sources and flags, the second one of the
compiler and the CPU. Where no compiler can be run, any file with the first half serves that this CPU can run (`library_file.py`).
It is written under another name, flushed to the disk and renamed, so no process ever loads a part of it, and neither does one that starts
after the machine has lost its power.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dct_compile.triton_kernels.cpu.compiler import FLAGS, CancelledError, Compilation, compiler_name
from dct_compile.triton_kernels.cpu.library_file import load, seal, sync_folder

logger = logging.getLogger("dct_compile.ops")

LOCK_TIMEOUT_S = 600


def _sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))


def _source_name() -> str:
    """Names the sources and how they are compiled: the first half of a library's name."""
    digest = hashlib.sha256(shlex.join(FLAGS).encode())
    for source in _sources():
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return f"kernels-{digest.hexdigest()[:24]}"


def _folders() -> Iterator[Path]:
    """Gives the folders that may hold the library, the preferred one first."""
    chosen, caches = os.environ.get("DCT_COMPILE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        yield Path(chosen).absolute()
    elif caches:
        yield Path(caches).absolute() / "dct_compile"
    else:
        home = Path(os.path.expanduser("~"))  # Path.expanduser would raise for a user without a home
        if home.is_absolute():
            yield home / ".cache" / "dct_compile"
    yield Path(default_cache_dir()).absolute() / "dct_compile"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _build(target: Path, compilation: Compilation) -> None:
    """Builds a library in a folder of its own and moves it to its place when it is whole, which is the last thing that is left to do."""
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.building-", dir=target.parent))
    whole = folder.with_name(f"{folder.name}.whole")
    try:
        library = compilation.compile([path for path in _sources() if path.suffix == ".cpp"], folder)
        seal(library)
        os.replace(library, whole)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    os.replace(whole, target)
    sync_folder(target.parent)


def _lock(name: str, folder: Path, timeout: float) -> FileLock:
    """Returns a lock that ends with the process that holds it."""
    return FileLock(folder / f"{name}.lock", timeout=timeout)


def _remove_dead_builds(folder: Path, own: str) -> None:
    """Removes what interrupted builds have left: those of the library ``own``, whose lock is held, and of others that nobody builds."""
    for left in folder.glob("kernels-*.building-*"):
        name = left.name.split(".building-")[0]
        try:
            with nullcontext() if name == own else _lock(name, folder, 0):
                _remove(left)
        except Timeout:
            continue


def _remove(left: Path) -> None:
    """Removes a file or folder of a dead build. A compiler of it that is about to end makes no file in a folder of another name."""
    doomed = left.with_name(f"{left.name}.dead")
    with suppress(OSError):
        os.rename(left, doomed)
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()


class _Build(threading.Thread):
    """Finds or makes the library, in the background. ``is_done``: unless it was cancelled, or its process was forked meanwhile."""

    def __init__(self) -> None:
        super().__init__(name="dct_compile kernels", daemon=True)
        self.compilation = Compilation()
        self.is_done = False
        self.library: ctypes.CDLL | None = None

    def run(self) -> None:
        try:
            self.library = self._find_or_make()
        except CancelledError:
            return
        except Exception as error:  # whatever is wrong with a machine, the references work
            logger.warning("the CPU kernels could not be compiled, the slower PyTorch reference is used instead: %s", _said(error))
        self.is_done = True

    def _find_or_make(self) -> ctypes.CDLL:
        sources, folders = _source_name(), list(_folders())
        try:
            return self._with_compiler(f"{sources}-{compiler_name()}", folders)
        except (OSError, subprocess.CalledProcessError) as error:
            unusable = []
            for file in [file for folder in folders for file in sorted(folder.glob(f"{sources}-*.so"))]:
                try:
                    return load(file)
                except OSError as reason:
                    unusable.append(str(reason))
            raise OSError("; ".join([_said(error), *unusable])) from error

    def _with_compiler(self, name: str, folders: list[Path]) -> ctypes.CDLL:
        for folder in folders:
            with suppress(OSError):
                return load(folder / f"{name}.so")
        reason: Exception = OSError(f"none of these folders can be written: {', '.join(map(str, folders))}")
        for folder in filter(_is_writable, folders):
            try:
                return self._make(folder / f"{name}.so")
            # Its disk is full, programs on it may not be executed, or another process is stuck while it builds.
            except (OSError, subprocess.CalledProcessError) as error:
                reason = error
        raise reason

    def _make(self, target: Path) -> ctypes.CDLL:
        # The ranks of a machine start together: one compiles, the others wait for it.
        with _lock(target.stem, target.parent, LOCK_TIMEOUT_S):
            self.compilation.check()
            with suppress(OSError):
                return load(target)
            _remove_dead_builds(target.parent, target.stem)
            _build(target, self.compilation)
        return load(target)


def _said(error: Exception) -> str:
    """Returns the reason in words: the compiler's own, where it has said any."""
    words = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else ""
    return words or str(error) or repr(error)


class _Library:
    """The one build of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._build: _Build | None = None

    def start(self, *, is_missed: bool = False) -> _Build:
        """Starts the build, if there is none. ``is_missed``: whether somebody waits for it, so that no compiler begins at low priority."""
        with self._lock:
            if self._build is None:
                self._build = _Build()
                if is_missed:
                    self._build.compilation.hurry()
                self._build.start()
            return self._build

    def is_ready(self) -> bool:
        """Says whether there is a library now; waits for one only where nobody has started to build it in the background."""
        build = self._build
        if build is None or not (build.is_done or build.is_alive()):
            return self.wait() is not None
        if not build.is_done:
            build.compilation.hurry()
        return build.is_done and build.library is not None

    def wait(self) -> ctypes.CDLL | None:
        """Returns the library, or None where there can be none. An exception that arrives meanwhile ends the build, and is raised."""
        while True:
            try:
                build = self._build or self.start(is_missed=True)
                if build.is_done:
                    return build.library
                build.compilation.hurry()
                build.join()
            except BaseException:
                if (started := self._build) is not None:
                    started.compilation.cancel()
                    self._forget(started)
                raise
            if not build.is_done:
                self._forget(build)

    def _forget(self, build: _Build) -> None:
        with self._lock:
            if self._build is build:
                self._build = None


_LIBRARY = _Library()


def prebuild() -> None:
    """Starts to build the library, or to load it, on a background thread. Until it is there, callers use the PyTorch references."""
    _LIBRARY.start()


def is_ready() -> bool:
    """Says whether the library can be used. Does not wait for a build that `prebuild` has started; builds it now where nobody has."""
    return _LIBRARY.is_ready()


def load_library() -> ctypes.CDLL | None:
    """Returns the library of all C++ kernels, or None (after one warning) where it cannot be built or loaded.

    The first call on a machine compiles for some seconds; later processes load the cached file. Calls through the returned object release
    the GIL. ``CXX`` selects the compiler. ``DCT_COMPILE_CACHE_DIR`` is the folder of the library; without it, that is ``dct_compile`` in
    ``XDG_CACHE_HOME`` or ~/.cache, or in torch's cache folder where these cannot be written. Where no compiler can be run, a library that
    another compiler has built is used, if it is there and its CPU had no instructions that this one lacks.

    Raises:
        KeyboardInterrupt: Ctrl-C while the library was built. The build ends; the next call starts another one.
    """
    return _LIBRARY.wait()
