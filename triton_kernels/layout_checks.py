"""Checks of the values that `layout.py` is made of: each raises ValueError with the field, its value and what is expected.

Kernels compute addresses from these values, so a wrong one must not get that far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dct_compile.triton_kernels.values import PerSegment

if TYPE_CHECKING:
    from dct_compile.triton_kernels.layout import GradientLayout, RowLayout, Selection

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of dense rows, of gradients, and of the values of rows on the wire."""
GRADIENT_VALUE_DTYPES = (*ROW_DTYPES, torch.int8)
METHODS = ("exact", "sampled", "laplace", "fixed")
WARMUPS = ("off", "geometric")
MAX_WIDTH = 65536
MAX_CHUNKS = 1 << 20
MAX_INT = (1 << 63) - 1
"""The largest integer that kernels know."""
MAX_FLOAT = torch.finfo(torch.float32).max
"""The largest threshold."""
_SMALLEST_BLOCK = 64
"""Kernels work on groups of so many elements."""


def check_one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Raises ValueError where ``value`` is none of ``known``."""
    if value not in known:
        said = value if isinstance(value, torch.dtype) else repr(value)
        raise ValueError(f"{name} is {said}: expected one of {', '.join(map(str, known))}")


def check_integer(name: str, value: int, low: int, high: int = MAX_INT) -> None:
    """Raises ValueError where ``value`` is not in [low, high]."""
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value}: expected an integer from {low} to {high}")


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError where ``value`` is not in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}: expected a number from {low:g} to {high:g}")


def check_density(density: float) -> None:
    """Raises ValueError where ``density`` is not in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is outside (0, 1]")


def check_gradient_layout(layout: GradientLayout, large_block: int, whole_piece: int) -> None:
    """Raises ValueError for a geometry that kernels do not know.

    A block lies in a tile, and has at most ``large_block`` elements, or is a whole piece of at most ``whole_piece``.
    """
    block, largest = layout.block, max((numel for _, numel in layout.segments), default=0)
    if block != whole_piece and not (_SMALLEST_BLOCK <= block <= large_block and block.bit_count() == 1):
        raise ValueError(f"block is {block}: expected a power of two from {_SMALLEST_BLOCK} to {large_block}, or {whole_piece}")
    if block == whole_piece and largest > whole_piece:
        raise ValueError(f"a segment of {largest} elements cannot be one block: at most {whole_piece}, or blocks of {large_block}")
    _check_segments(layout.segments)
    check_integer("chunks", layout.chunks, 1, MAX_CHUNKS)
    check_integer("chunk", layout.chunk, -1, layout.chunks - 1)
    for name, fraction in _each("capacity_fraction", layout.capacity_fraction):
        check_number(name, fraction, 0, 1)
    check_one_for_each("capacity_fraction", layout.capacity_fraction, layout)
    check_one_of("value_dtype", layout.value_dtype, GRADIENT_VALUE_DTYPES)


def check_one_for_each(name: str, numbers: PerSegment, layout: GradientLayout) -> None:
    """Raises ValueError where ``numbers`` are not as many as the segments of ``layout``."""
    if isinstance(numbers, tuple) and len(numbers) != len(layout.segments):
        raise ValueError(f"{name} has {len(numbers)} numbers: expected one, or one for each of {len(layout.segments)} segments")


def _each(name: str, numbers: PerSegment) -> list[tuple[str, float]]:
    """Returns every number with its name."""
    return [(f"{name}[{i}]", number) for i, number in enumerate(numbers)] if isinstance(numbers, tuple) else [(name, numbers)]


def check_selection(selection: Selection) -> None:
    """Raises ValueError for a choice of thresholds that kernels do not know."""
    for _, density in _each("density", selection.density):
        check_density(density)
    check_one_of("method", selection.method, METHODS)
    check_number("fixed", selection.fixed, 0, MAX_FLOAT)
    check_integer("refresh_interval", selection.refresh_interval, 1)
    check_one_of("refresh_warmup", selection.refresh_warmup, WARMUPS)
    check_one_of("hold", selection.hold, (False, True))


def check_row_layout(layout: RowLayout) -> None:
    """Raises ValueError for rows that the payload cannot express."""
    check_row_shape(layout.row_shape)
    if layout.width > MAX_WIDTH:
        raise ValueError(f"row width {layout.width} is outside 1..{MAX_WIDTH}")
    if not 1 <= layout.capacity <= layout.width:
        raise ValueError(f"capacity {layout.capacity} is outside 1..{layout.width}, the width of the row")
    check_one_of("value dtype", layout.value_dtype, ROW_DTYPES)


def check_row_shape(row_shape: Sequence[int]) -> None:
    """Raises ValueError where these are not the sizes of rows with an element or more."""
    if not row_shape:
        raise ValueError("row_shape is empty, expected at least the width of the rows")
    if min(row_shape) < 0 or row_shape[-1] < 1:
        raise ValueError(f"row_shape is {list(row_shape)}: expected sizes of 0 or more, and a last one, the width, of 1 or more")


def _check_segments(segments: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError where a segment ``(offset, numel)`` is none, or where two overlap; empty ones overlap nothing."""
    for number, (offset, numel) in enumerate(segments):
        if not (offset >= 0 and numel >= 0 and offset + numel <= MAX_INT):
            raise ValueError(f"segments[{number}] is ({offset}, {numel}): expected (offset, numel), both from 0, their sum to {MAX_INT}")
    end = 0
    for offset, numel in sorted(segment for segment in segments if segment[1]):
        if offset < end:
            raise ValueError(f"segment ({offset}, {numel}) begins before {end}, the end of another: expected segments that do not overlap")
        end = offset + numel
