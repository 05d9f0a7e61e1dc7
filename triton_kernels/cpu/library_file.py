"""The file of the C++ kernels: what stands behind the library in it, and how it is checked before it is loaded.

Behind the library stand the features of the CPU that it was built for, their length in 4 bytes, and a checksum of all before::

    library | features, separated by spaces | length of the features | SHA-256

So neither a part of a file nor a file from another machine is ever mapped into memory, where it could end the process (SIGBUS, SIGILL).
"""

import ctypes
import hashlib
import os
import platform
from functools import cache
from pathlib import Path

_CHECKSUM_BYTES = hashlib.sha256().digest_size
_LENGTH_BYTES = 4
_NAMED = 4
"""Missing features that a message names."""


class UnusableError(OSError):
    """A file is no library that this machine can run. The message names the file and says why."""


@cache
def cpu_features() -> frozenset[str]:
    """Returns the architecture and the instruction sets of this machine, by the names that Linux gives them.

    Where the system names none, the machine's own name takes their place: a library is then used only where it was built.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip().lower() in ("flags", "features", "isa"))
    return frozenset([platform.machine(), *next(named, [f"host-{platform.node()}"])])


def seal(file: Path) -> None:
    """Writes the features of this CPU and the checksum behind a library, and flushes all to the disk."""
    features = " ".join(sorted(cpu_features())).encode()
    with file.open("rb+") as opened:
        content = opened.read()
        footer = features + len(features).to_bytes(_LENGTH_BYTES, "little")
        opened.write(footer + hashlib.sha256(content + footer).digest())
        opened.flush()
        os.fsync(opened.fileno())


def load(file: Path) -> ctypes.CDLL:
    """Loads a library that `seal` has finished.

    Raises:
        FileNotFoundError: There is no such file.
        UnusableError: It is damaged, or for a CPU with instructions that this one lacks.
        OSError: The system does not load it: it may lie where nothing may be executed.
    """
    content = file.read_bytes()
    body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest() != checksum:
        raise UnusableError(f"{file} is damaged")
    features, length = body[:-_LENGTH_BYTES], int.from_bytes(body[-_LENGTH_BYTES:], "little")
    missing = sorted(set(features[len(features) - length :].decode().split()) - cpu_features())
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise UnusableError(f"{file} is for a CPU with {', '.join(missing[:_NAMED])}{more}, which this one lacks")
    return ctypes.CDLL(str(file))


def sync_folder(folder: Path) -> None:
    """Flushes a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
