"""The namespace `dct` of custom operators, and how one is defined."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("dct", "DEF")
"""Kept for the life of the process: its end would unregister the operators."""


def _on_device_of_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    @wraps(function)
    def call(first: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *args)

    return call


def define_op(schema: str, *, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> torch._ops.OpOverload:
    """Defines ``dct::name`` from its schema ``"name(...) -> ..."`` and returns its one overload.

    ``fake`` gives shape, dtype and stride of the result without touching data. ``cpu`` and ``cuda`` do the work; they must leave the
    version counters of the tensors they mutate alone (write through ``.data`` or raw pointers): a residual is saved for the backward
    of the step before, and changing it by then is intended.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, _on_device_of_first(cuda), "CUDA")
    torch.library.register_fake(f"dct::{name}", fake, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.dct, name).default
    return overload
