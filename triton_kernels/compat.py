"""Triton is optional: without it the kernels are never called, and their modules still import."""

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
    """``triton.jit`` where there is Triton; the plain function, which nothing calls, where there is none."""
    return function if triton is None else triton.jit(function)


__all__ = ["HAS_TRITON", "jit", "tl", "triton"]
