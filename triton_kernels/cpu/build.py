"""Compiles the C++ kernels of this folder once per machine and version, and loads them with ctypes.

A machine without a C++ compiler is supported: `load_library` returns None, after one warning, and callers use the PyTorch references.

The library is a file in the user's cache folder, named by a digest of all that decides its contents. It ends with a checksum of its bytes:
a file without the right one is built again. It is written under another name, flushed to the disk and renamed, so no process ever loads a
part of it, and neither does one that starts after the machine has lost its power.
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
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock, Timeout
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dct_compile.triton_kernels.cpu.compiler import FLAGS, CancelledError, Compilation, compiler

logger = logging.getLogger("dct_compile.ops")

LOCK_TIMEOUT_S = 600
_CHECKSUM_BYTES = hashlib.sha256().digest_size


def _sources() -> list[Path]:
    return sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))


def _library_name() -> str:
    """Names the library by all that decides its contents: sources, flags, and what -march=native means to this compiler on this CPU."""
    resolved = subprocess.run([*compiler(), "-march=native", "-###", "-E", "-x", "c++", os.devnull], capture_output=True, check=True)
    digest = hashlib.sha256(resolved.stderr)
    digest.update(shlex.join([*compiler(), *FLAGS]).encode())
    for source in _sources():
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return f"kernels-{digest.hexdigest()[:32]}"


def _folders() -> Iterator[Path]:
    """Gives the folders that may hold the library, the preferred one first."""
    chosen, caches = os.environ.get("DCT_COMPILE_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        yield Path(chosen).absolute()
    elif caches:
        yield Path(caches).absolute() / "dct_compile"
    else:
        home = Path("~").expanduser()
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


def _load(target: Path) -> ctypes.CDLL | None:
    """Loads a library, or returns None where there is none, no whole one, or one that the system does not let us execute."""
    try:
        content = target.read_bytes()
        if hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() == content[-_CHECKSUM_BYTES:]:
            return ctypes.CDLL(str(target))
    except OSError:
        pass
    return None


def _build(target: Path, compilation: Compilation) -> None:
    """Builds a library in a folder of its own and moves it to its place when it is whole."""
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.building-", dir=target.parent))
    try:
        library = compilation.compile([path for path in _sources() if path.suffix == ".cpp"], folder)
        with library.open("rb+") as file:
            checksum = hashlib.sha256(file.read()).digest()
            file.write(checksum)
            file.flush()
            os.fsync(file.fileno())
        os.replace(library, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Flushes a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(name: str, folder: Path, timeout: float) -> FileLock:
    """Returns a lock that ends with the process that holds it."""
    return FileLock(folder / f"{name}.lock", timeout=timeout)


def _remove_dead_builds(folder: Path, own: str) -> None:
    """Removes what interrupted builds have left: those of the library ``own``, whose lock is held, and of others that nobody builds."""
    for left in folder.glob("kernels-*.building-*"):
        name = left.name.split(".building-")[0]
        try:
            with nullcontext() if name == own else _lock(name, folder, 0):
                shutil.rmtree(left, ignore_errors=True)
        except Timeout:
            continue


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
        except subprocess.CalledProcessError as error:
            self._warn(error.stderr.decode(errors="replace").strip())
        except OSError as error:
            self._warn(str(error))
        self.is_done = True

    def _find_or_make(self) -> ctypes.CDLL:
        name, folders = _library_name(), list(_folders())
        for folder in folders:
            if (found := _load(folder / f"{name}.so")) is not None:
                return found
        reason = OSError(f"none of these folders can be written: {', '.join(map(str, folders))}")
        for folder in filter(_is_writable, folders):
            try:
                return self._make(name, folder)
            except OSError as error:  # programs on that file system may not be executed, or another process is stuck while it builds
                reason = error
        raise reason

    def _make(self, name: str, folder: Path) -> ctypes.CDLL:
        target = folder / f"{name}.so"
        # The ranks of a machine start together: one compiles, the others wait for it.
        with _lock(name, folder, LOCK_TIMEOUT_S):
            self.compilation.check()
            if (found := _load(target)) is not None:
                return found
            _remove_dead_builds(folder, name)
            _build(target, self.compilation)
        return ctypes.CDLL(str(target))

    def _warn(self, reason: str) -> None:
        logger.warning("the CPU kernels could not be compiled, the slower PyTorch reference is used instead: %s", reason)


class _Library:
    """The one build of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._build: _Build | None = None

    def start(self) -> _Build:
        """Starts the build, if there is none."""
        with self._lock:
            if self._build is None:
                self._build = _Build()
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
            build = self._build or self.start()
            if build.is_done:
                return build.library
            build.compilation.hurry()
            try:
                build.join()
            except BaseException:
                build.compilation.cancel()
                self._forget(build)
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
    ``XDG_CACHE_HOME`` or ~/.cache, or in torch's cache folder where these cannot be written.

    Raises:
        KeyboardInterrupt: Ctrl-C while the library was built. The build ends; the next call starts another one.
    """
    return _LIBRARY.wait()
