"""Shared by the callers of the C++ kernels: numbers of dtypes, look-up of functions."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from dct_compile.triton_kernels.cpu.build import load_library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of tensors that kernels know, as common.h numbers them."""
VALUE_DTYPE_CODES = {**DTYPE_CODES, torch.int8: 3}
"""The dtypes of a gradient payload's values, as gradient.h numbers them."""


@cache
def cpu_function(name: str, parameters: tuple[type, ...]) -> Callable[..., None]:
    """Returns the C function ``name`` with the given ctypes parameter types and no result.

    Raises:
        RuntimeError: There is no library.
    """
    library = load_library()
    if library is None:
        raise RuntimeError(f"there is no {name}: the C++ kernels could not be compiled")
    function = getattr(library, name)
    function.argtypes = parameters
    function.restype = None
    return function  # type: ignore[no-any-return]


POINTER = ctypes.c_void_p
INT = ctypes.c_int64
DOUBLE = ctypes.c_double
