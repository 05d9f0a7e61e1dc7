"""The structs by which the C++ kernels are called: the same fields in the same order as in the header that each one names."""

from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from functools import lru_cache

from torch import Tensor

from dct_compile.triton_kernels.cpu.dispatch import DTYPE_CODES
from dct_compile.triton_kernels.layout import GradientLayout, RowLayout


class Bucket(Structure):
    """gradient_kernels.h: a flat buffer of gradients."""

    _fields_ = (("start", c_void_p), ("numel", c_int64), ("dtype", c_int64))

    @classmethod
    def of(cls, buffer: Tensor) -> "Bucket":
        return cls(buffer.data_ptr(), buffer.numel(), DTYPE_CODES[buffer.dtype])


class State(Structure):
    """gradient_kernels.h: residual (null without error feedback), threshold, counters."""

    _fields_ = (("residual", c_void_p), ("threshold", c_void_p), ("counters", c_void_p))

    @classmethod
    def of(cls, residual: Tensor, threshold: Tensor, counters: Tensor, error_feedback: bool) -> "State":
        return cls(residual.data_ptr() if error_feedback else None, threshold.data_ptr(), counters.data_ptr())


class Gathered(Structure):
    """gradient_kernels.h: payloads of chunks, one after the other."""

    _fields_ = (("bytes", c_void_p), ("payloads", c_int64))

    @classmethod
    def of(cls, gathered: Tensor, layout: GradientLayout) -> "Gathered":
        return cls(gathered.data_ptr(), gathered.numel() // max(layout.chunk_bytes, 1))


class Uncovered(Structure):
    """gradient_kernels.h: the elements that no segment covers (``dense`` is null where they are to be 0), and their ranges."""

    _fields_ = (("dense", c_void_p), ("ranges", c_void_p), ("count", c_int64))


class Selecting(Structure):
    """gradient_kernels.h: how thresholds are chosen, and in which regions. ``tables``: the tensors that hold their numbers."""

    tables: tuple[Tensor, Tensor]
    _fields_ = (
        ("regions", c_void_p),
        ("count", c_int64),
        ("method", c_int64),
        ("constant", c_double),
        ("factors", c_void_p),
        ("interval", c_int64),
        ("geometric", c_int64),
        ("hold", c_int64),
    )


class Rows(Structure):
    """rows.h: dense rows, or values without their indices."""

    _fields_ = (("start", c_void_p), ("rows", c_int64), ("dtype", c_int64))

    @classmethod
    def of(cls, x: Tensor, inner: int) -> "Rows":
        """Of a tensor [R, ...] with ``inner`` rows in one leading index."""
        return cls(x.data_ptr(), x.shape[0] * inner, DTYPE_CODES[x.dtype])


class RowFormat(Structure):
    """rows.h: the geometry of a packed row."""

    _fields_ = (("width", c_int64), ("capacity", c_int64), ("value_bytes", c_int64), ("index_bytes", c_int64), ("value_dtype", c_int64))

    @classmethod
    @lru_cache(maxsize=4096)
    def of(cls, layout: RowLayout) -> "RowFormat":
        dtype = layout.value_dtype
        return cls(layout.width, layout.capacity, dtype.itemsize, layout.index_bytes, DTYPE_CODES[dtype])


BUCKET, STATE, GATHERED, UNCOVERED, SELECTING = map(POINTER, (Bucket, State, Gathered, Uncovered, Selecting))
ROWS, ROW_FORMAT = map(POINTER, (Rows, RowFormat))
"""Types of the parameters that take such a struct; ctypes passes its address."""
