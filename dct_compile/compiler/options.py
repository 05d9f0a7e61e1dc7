"""Reads the options of ``torch.compile(..., backend="dct")``."""

from collections.abc import Mapping
from typing import Any

import torch._inductor.config as inductor_config
import torch.distributed as dist
from torch._inductor import list_mode_options, list_options
from torch.distributed import ProcessGroup

from dct_compile.config import DCTConfig
from dct_compile.options import split_options
from dct_compile.triton_kernels.compat import HAS_TRITON


def read_options(options: Mapping[str, Any] | None, mode: str | None = None) -> tuple[DCTConfig, dict[str, Any]]:
    """Returns this project's options, and those of Inductor, with those that ``mode`` stands for.

    Raises:
        ValueError: An option is unknown, or its value is not allowed.
    """
    config, patches = split_options(options, list_options())
    if config.inline_kernels and not HAS_TRITON:
        raise ValueError("option 'inline_kernels' is True, but Triton is not installed: there are no kernels to inline")
    _check_inductor_types(patches)
    return config, patches if mode in (None, "default") else {**list_mode_options(mode), **patches}


def gradient_group(config: DCTConfig, reduced_outside: bool) -> ProcessGroup | None:
    """Returns the ranks among which the backend averages gradients, ``None`` where it does not.

    Raises:
        ValueError: Something outside of the graph averages them, too (``reduced_outside``).
    """
    if config.data_parallel is False:
        return None
    if reduced_outside:
        config.check_single_average()
    group = dist.group.WORLD if config.data_parallel is True else config.data_parallel
    assert isinstance(group, ProcessGroup)
    return group


def _check_inductor_types(patches: Mapping[str, Any]) -> None:
    current = inductor_config.get_config_copy()
    for key, value in patches.items():
        default = current[key]
        if isinstance(default, bool | int | float | str) and not isinstance(value, type(default)):
            raise ValueError(f"option {key!r} is {value!r} ({type(value).__name__}); Inductor expects {type(default).__name__}")
