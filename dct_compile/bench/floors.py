"""The memory traffic that no op can do without, in bytes.

Each input element is read once, each output element written once; where only some elements are read, the cache lines that hold them. All
entries of a payload count, free ones too: they are written as zeros.
"""

from math import ceil

from dct_compile.bench.inputs import VALUE_DTYPE, Problem
from dct_compile.bench.machine import line_bytes
from dct_compile.triton_kernels.layout import quantized_row_bytes, row_bytes
from dct_compile.triton_kernels.select_threshold import SAMPLE_GROUP, sample_stride

STATE_BYTES = 4
"""Bytes of a residual's element, a float32."""


def _dense_bytes(problem: Problem) -> int:
    return problem.numel * problem.dtype.itemsize


def select_bytes(problem: Problem) -> int:
    """Returns the floor of `select_threshold` where all elements are looked at."""
    return _dense_bytes(problem) + problem.numel * STATE_BYTES


def _touched_bytes(problem: Problem, itemsize: int, fraction: float) -> int:
    """Returns the bytes of the lines that hold at least one of ``fraction`` of the elements, wherever these are."""
    per_line = line_bytes(problem.device) // itemsize
    return round(problem.numel * itemsize * (1 - (1 - fraction) ** per_line))


def sampled_bytes(problem: Problem) -> int:
    """Returns the floor of `select_threshold`, "sampled": the lines with a sample. A group lies in as few as it can."""
    groups = ceil(problem.numel / (SAMPLE_GROUP * sample_stride(problem.numel)))
    line = line_bytes(problem.device)
    return sum(min(problem.numel * size, groups * max(SAMPLE_GROUP * size, line)) for size in (problem.dtype.itemsize, STATE_BYTES))


def pack_bytes(problem: Problem) -> int:
    """Returns the floor of `threshold_pack`."""
    return _dense_bytes(problem) + 2 * problem.numel * STATE_BYTES + problem.layout.payload_bytes


def unpack_bytes(problem: Problem, payloads: int) -> int:
    """Returns the floor of `unpack_accumulate`."""
    return _dense_bytes(problem) + payloads * problem.layout.payload_bytes


def repack_bytes(problem: Problem, payloads: int) -> int:
    """Returns the floor of `repack`."""
    return 2 * problem.numel * STATE_BYTES + (payloads + 1) * problem.layout.payload_bytes


def rows_bytes(problem: Problem, method: str = "exact") -> int:
    """Returns the floor of the row ops that read or write rows as a whole."""
    return _dense_bytes(problem) + problem.rows * problem.row_layout(method).row_bytes


def gather_bytes(problem: Problem) -> int:
    """Returns the floor of `gather_rows`."""
    lines = _touched_bytes(problem, problem.dtype.itemsize, problem.kept / problem.width)
    return lines + problem.rows * problem.kept * row_bytes(problem.width, 1, VALUE_DTYPE)


def quantized_bytes(problem: Problem, bits: int) -> int:
    """Returns the floor of `quantize_rows` and `dequantize_rows`."""
    return _dense_bytes(problem) + problem.rows * quantized_row_bytes(problem.width, bits)


def store_bytes(problem: Problem) -> int:
    """Returns the floor of `store`."""
    return 2 * _dense_bytes(problem)


def moments_bytes(problem: Problem, gaps: bool) -> int:
    """Returns the floor of `prepare_moments`; with gaps, the lines of the second moment and of the last steps where an element arrives."""
    sizes = (problem.dtype.itemsize, 4) if gaps else ()
    return 2 * _dense_bytes(problem) + sum(2 * _touched_bytes(problem, size, problem.density) for size in sizes)
