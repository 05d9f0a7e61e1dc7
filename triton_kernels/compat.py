"""Triton is optional: without it the kernels are never called, and their modules still import."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

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


def constexpr_function(function: Callable[..., Any]) -> Any:
    """``triton.constexpr_function`` where there is Triton: a function that kernels call while they are compiled."""
    return function if triton is None else triton.constexpr_function(function)


class _Recording(threading.local):
    """Whether this thread traces a graph that is to show the launches."""

    active = False


_RECORDING = _Recording()


@contextmanager
def recorded_launches() -> Iterator[None]:
    """Within it `launch` starts nothing, but puts nodes into the graph that is being traced."""
    _RECORDING.active = True
    try:
        yield
    finally:
        _RECORDING.active = False


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """Returns the callable that starts ``kernel`` on ``grid``."""
    return (torch.library.wrap_triton(kernel) if _RECORDING.active else kernel)[grid]  # type: ignore[no-any-return]


__all__ = ["HAS_TRITON", "constexpr_function", "jit", "launch", "recorded_launches", "tl", "triton"]
