"""The methods that "dct" is compared with: dense first, then the hooks of torch's DDP that users would take instead."""

from typing import Any

BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "fp16 hook": ("fp16", {}),
    "PowerSGD hook, rank 1": ("powersgd-1", {}),
    "PowerSGD hook, rank 2": ("powersgd-2", {}),
    "PowerSGD hook, rank 4": ("powersgd-4", {}),
}
"""Backend (dct_compile/cli/methods.py) and options by name."""
