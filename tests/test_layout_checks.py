"""The values that operators take as geometry: one that means nothing to the kernels cannot be made."""

import re
from typing import Any

import pytest
import torch

from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, RowLayout, Selection

NAN, INF = float("nan"), float("inf")
GRADIENT = {
    "segments": ((3, 400), (500, 300)),
    "block": 256,
    "chunks": 2,
    "chunk": 1,
    "capacity_fraction": 0.3,
    "value_dtype": torch.bfloat16,
}
SELECTION = {"density": 0.1, "method": "exact", "fixed": 0.0, "refresh_interval": 10, "refresh_warmup": "geometric"}
ROWS = {"row_shape": (2, 40), "capacity": 5, "value_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("segments", ((-3, 400),), r"segments\[0\] is \(-3, 400\): expected \(offset, numel\), both from 0"),
        ("segments", ((0, 4), (4, -1)), r"segments\[1\] is \(4, -1\): expected \(offset, numel\), both from 0"),
        ("segments", ((2**63 - 400, 401),), rf"segments\[0\] is \({2**63 - 400}, 401\): .* their sum to 9223372036854775807"),
        ("segments", ((2**70, 1),), rf"segments\[0\] is \({2**70}, 1\)"),
        ("segments", ((0, 400), (399, 300)), r"segment \(399, 300\) begins before 400, the end of another: expected segments that do not"),
        ("segments", ((500, 300), (0, 600)), r"segment \(500, 300\) begins before 600"),
        ("segments", ((0, 400), (0, 400)), r"segment \(0, 400\) begins before 400"),
        *[("block", value, f"block is {value}: expected a power of two from 64 to 4096, or {WHOLE_PIECE}") for value in (0, 32, 300, 8192)],
        *[("chunks", value, f"chunks is {value}: expected an integer from 1 to 1048576") for value in (0, -2, 2**40, 2.0)],
        *[("chunk", value, f"chunk is {value}: expected an integer from -1 to 1") for value in (-2, 2, 2**70)],
        *[("capacity_fraction", value, f"capacity_fraction is {value}: expected a number from 0 to 1") for value in (-0.1, 1.5, NAN, INF)],
        ("value_dtype", torch.float64, r"value_dtype is torch.float64: expected one of torch.float32, .*torch.int8"),
    ],
)
def test_no_gradient_layout(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientLayout(**{**GRADIENT, field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[("density", value, f"density {value} is outside") for value in (0, 0.0, -0.1, 1.1, NAN, INF)],
        ("method", "median", "method is 'median': expected one of exact, sampled, laplace, fixed"),
        *[("fixed", value, re.escape(f"fixed is {value}: expected a number from 0 to 3.40282e+38")) for value in (-1.0, NAN, INF, 1e39)],
        *[("refresh_interval", value, f"refresh_interval is {value}: expected an integer from 1 to") for value in (0, -1, 2**63, 1.5)],
        ("refresh_warmup", "on", "refresh_warmup is 'on': expected one of off, geometric"),
        ("hold", "yes", "hold is 'yes': expected one of False, True"),
    ],
)
def test_no_selection(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection(**{**SELECTION, field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("capacity", 41, "capacity 41 is outside"),
        ("capacity", 0, "capacity 0 is outside"),
        ("capacity", -1, r"capacity -1 is outside 1\.\.40, the width of the row"),
        ("value_dtype", torch.float64, "value dtype is"),
        ("value_dtype", torch.int8, "value dtype is torch.int8: expected one of torch.float32, torch.bfloat16, torch.float16"),
        ("row_shape", (), "row_shape is empty"),
        ("row_shape", (65537,), "width 65537 is outside"),
        ("row_shape", (2, 0), r"row_shape is \[2, 0\]: expected sizes of 0 or more, and a last one, the width, of 1 or more"),
        ("row_shape", (-2, 40), r"row_shape is \[-2, 40\]: expected sizes"),
    ],
)
def test_no_row_layout(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowLayout(**{**ROWS, field: value})


def test_edges_that_are_meant() -> None:
    for segments in ((), ((0, 0),), ((5, 700), (705, 0), (705, 9)), ((500, 300), (3, 400)), ((4, 10), (7, 0)), ((2**62, 2**40),)):
        assert GradientLayout(**{**GRADIENT, "segments": segments}).segments == segments
    for block in (64, 256, 4096, WHOLE_PIECE):
        assert GradientLayout(**{**GRADIENT, "block": block}).block == block
    for fraction in (0, 0.0, 5e-324, 1):
        assert GradientLayout(**{**GRADIENT, "capacity_fraction": fraction}).capacity_fraction == fraction
    for density in (5e-324, 1):
        assert Selection(**{**SELECTION, "density": density}).density == density
    assert RowLayout((0, 40), 40, torch.float32).inner == 0
