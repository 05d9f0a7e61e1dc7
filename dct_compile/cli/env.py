"""``dct env``: what a report about a fault needs."""

import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

from dct_compile.version import own_version

PACKAGES = ("torch", "triton", "numpy", "click", "torchrec", "fbgemm-gpu", "optuna")
VARIABLES = (
    *("CC", "CUDA_VISIBLE_DEVICES", "CXX", "LD_PRELOAD", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"),
    *("NO_COLOR", "XDG_CACHE_HOME"),
)
PREFIXES = ("DCT_COMPILE_", "GLOO_", "GOMP_", "KMP_", "MASTER_", "MKL_", "NCCL_", "OMP_", "TORCH", "TRITON_", "UCC_")
"""The environment variables that are shown: none that could hold a secret."""


@click.command()
def env() -> None:
    """Print versions, compiler, kernels, GPUs and settings of this machine, for a report about a fault.

    The C++ kernels are built where they are not there yet, which takes some seconds.
    """
    for title, find in _FINDERS.items():
        try:
            found = find()
        except Exception as error:  # of a broken installation, all else is wanted the more
            found = f"error: {type(error).__name__}: {error}"
        click.echo(f"{title + ':':<20}{found}")
    for name in sorted(os.environ):
        if name in VARIABLES or name.startswith(PREFIXES):
            click.echo(f"{name}={os.environ[name]}")


def _package() -> str:
    return f"{own_version()}, in {Path(__file__).parents[1]}"


def _packages() -> str:
    return ", ".join(_versions())


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, git {torch.version.git_version}"


def _processor() -> str:
    import torch

    from dct_compile.bench.machine import processor_name

    return f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _compiler() -> str:
    from dct_compile.triton_kernels.cpu.compiler import compiler

    command = compiler()
    said = subprocess.run([*command, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return f"{shlex.join(command)}: {said.stdout.splitlines()[0]}"


def _kernels() -> str:
    from dct_compile.triton_kernels.cpu.build import load_library

    library = load_library()
    return f"built, {library._name}" if library is not None else "not built: the slower PyTorch references run"


def _triton() -> str:
    from dct_compile.triton_kernels.compat import HAS_TRITON

    return ("there, interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "there") if HAS_TRITON else "missing"


def _devices() -> str:
    import torch

    count = torch.cuda.device_count()
    names = (torch.cuda.get_device_properties(number) for number in range(count))
    return "; ".join(f"{device.name}, {device.total_memory >> 20} MiB, sm_{device.major}{device.minor}" for device in names) or "none"


def _backends() -> str:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return "none: this torch has no torch.distributed"
    there = [name for name in ("gloo", "nccl", "mpi", "ucc", "xccl") if getattr(dist, f"is_{name}_available")()]
    numbers = f" (NCCL {'.'.join(map(str, torch.cuda.nccl.version()))})" if "nccl" in there else ""
    return f"{', '.join(there)}{numbers}"


_FINDERS: dict[str, Callable[[], str]] = {
    "dct-compile": _package,
    "Python": lambda: f"{platform.python_version()} {platform.python_implementation()}",
    "system": platform.platform,
    "processor": _processor,
    "packages": _packages,
    "torch": _torch,
    "C++ compiler": _compiler,
    "C++ kernels": _kernels,
    "Triton kernels": _triton,
    "CUDA devices": _devices,
    "process groups": _backends,
}
