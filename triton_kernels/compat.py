"""Triton is optional: without it the kernels are never called, and their modules still import."""

import inspect
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

HAS_TRITON = triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` where there is Triton; the plain function, which nothing calls, where there is none.

    A kernel is not compiled anew for other values of its integers: they are sizes, which differ from bucket to bucket.
    """
    if triton is None:
        return function
    sizes = [
        parameter.name for parameter in inspect.signature(function).parameters.values() if parameter.annotation == inspect.Parameter.empty
    ]
    return triton.jit(function, do_not_specialize=[name for name in sizes if not name.endswith("_ptr")])


__all__ = ["HAS_TRITON", "jit", "tl", "triton"]
