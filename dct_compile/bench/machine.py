"""The machine that is measured: names, caches, free memory."""

import ctypes
import datetime
import os
import platform
from pathlib import Path

import torch

LARGEST_CACHE_BYTES = 64 * 2**20
"""Last-level cache of a CPU that does not say how much it has, and the most that is believed: a virtual machine names its host's."""
_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}
_CPUS = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of malloc.h."""


def processor_name() -> str:
    """Returns the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def last_level_cache_bytes(device: torch.device) -> int:
    """Returns bytes of the GPU's L2 cache, or of all last-level caches of the CPU together."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches: dict[tuple[int, str], int] = {}
    for folder in _CPUS.glob("cpu[0-9]*/cache/index*"):
        try:
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        except OSError:
            continue
        caches[int(level), shared] = int(size[:-1]) * _SUFFIXES[size[-1]]
    last = max((level for level, _ in caches), default=0)
    return min(sum(size for (level, _), size in caches.items() if level == last) or LARGEST_CACHE_BYTES, LARGEST_CACHE_BYTES)


def line_bytes(device: torch.device) -> int:
    """Returns the least that memory moves for one element: a cache line of a CPU, a sector of a GPU's."""
    return 32 if device.type == "cuda" else 64


def available_bytes(device: torch.device) -> int:
    """Returns bytes of memory that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    _give_back_freed_memory()
    if _MEMINFO.exists():
        kib = next(line.split()[1] for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(kib) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def keep_freed_memory() -> None:
    """Lets this process keep the CPU memory that it frees, as PyTorch's allocator for CUDA does.

    glibc hands every block of more than 32 MiB back to the system; the page faults of the next one can take several times as long as
    the op that fills it, and would be timed with it. Does nothing where there is no glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never: the largest number that it takes, 2 GiB, is less than what a large sort frees


def _give_back_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def circumstances() -> str:
    """Processor, cores, threads, versions and date, in one line."""
    machine = f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {datetime.date.today().isoformat()}"
