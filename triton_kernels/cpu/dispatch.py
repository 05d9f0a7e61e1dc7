"""What the callers of the C++ kernels share."""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

from dct_compile.triton_kernels.cpu.build import load_library

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that kernels know, as common.h numbers them."""


@cache
def cpu_function(name: str, parameters: tuple[type, ...]) -> Callable[..., None] | None:
    """The C function `name` with the given ctypes parameter types and no result, or None where the library cannot be built."""
    library = load_library()
    if library is None:
        return None
    function = getattr(library, name)
    function.argtypes = parameters
    function.restype = None
    return function  # type: ignore[no-any-return]


POINTER = ctypes.c_void_p
INT = ctypes.c_int64
DOUBLE = ctypes.c_double
