"""Operators called with tensors and numbers that they do not take: an error that names them, in every implementation and while tracing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from dct_compile.ops import (
    dequantize_rows,
    gather_rows,
    pack_rows,
    prepare_moments,
    quantize_rows,
    repack,
    scatter_rows,
    select_threshold,
    store,
    threshold_pack,
    unpack_accumulate,
    unpack_into,
    unpack_rows,
)
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.layout import GradientLayout, RowLayout, Selection

BF16 = torch.bfloat16
SEGMENTS = ((3, 400), (500, 300))
WHOLE, OWNED = (GradientLayout(SEGMENTS, 256, 2, chunk, 0.3, BF16) for chunk in (-1, 1))
SELECTION, FIXED = Selection(0.1, "exact", 0.0, 1, "off"), Selection(0.1, "fixed", 0.5, 1, "off")
ROWS = RowLayout((2, 40), 5, BF16)
META = torch.device("meta")


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


def state(numel: int) -> dict[str, Any]:
    return {"residual": torch.zeros(numel), "threshold": torch.ones(2), "counters": torch.zeros(2, 5, dtype=torch.int64)}


def good(op: Any) -> dict[str, Any]:
    """Returns arguments that ``op`` takes, by name and in its order."""
    packing = {"layout": WHOLE, "error_feedback": True}
    selecting = {"selection": SELECTION, "error_feedback": True}
    return {
        select_threshold: {"grad": torch.zeros(810), **state(700), "layout": WHOLE, **selecting},
        threshold_pack: {"grad": torch.zeros(810), **state(700), **packing},
        unpack_accumulate: {
            "gathered": bytes_of(3 * WHOLE.payload_bytes),
            "dense": torch.zeros(110),
            "numel": 810,
            "dtype": torch.float32,
            "layout": WHOLE,
            "divisor": 3,
        },
        unpack_into: {
            "out": torch.zeros(810),
            "gathered": bytes_of(3 * WHOLE.payload_bytes),
            "dense": torch.zeros(110),
            "layout": WHOLE,
            "divisor": 3,
        },
        repack: {"gathered": bytes_of(4 * OWNED.chunk_bytes), **state(OWNED.state_numel), "layout": OWNED, **selecting},
        pack_rows: {"x": torch.zeros(4, 2, 40), "layout": ROWS, "method": "exact", "density": 0.1, "fixed": 0.0},
        unpack_rows: {"payload": bytes_of(4, 30), "layout": ROWS, "addends": 2, "dtype": torch.float32},
        gather_rows: {"grad": torch.zeros(2, 2, 40), "payload": bytes_of(4, 30), "layout": ROWS, "value_dtype": BF16},
        scatter_rows: {"values": torch.zeros(8, 10), "payload": bytes_of(4, 30), "layout": ROWS, "addends": 2, "dtype": BF16},
        quantize_rows: {"x": torch.zeros(4, 2, 40), "seed": torch.tensor([7]), "bits": 8},
        dequantize_rows: {"payload": bytes_of(4, 84), "row_shape": [2, 40], "bits": 8, "dtype": BF16},
        store: {"state": torch.zeros(5), "value": torch.ones(5)},
        prepare_moments: {
            "scalars": torch.zeros(5),
            "shares": torch.zeros(9),
            "grads": [torch.zeros(3, 4), torch.zeros(7)],
            "parameters": [torch.zeros(3, 4), torch.zeros(7)],
            "first": [torch.zeros(3, 4), torch.zeros(7)],
            "second": [torch.zeros(3, 4), torch.zeros(7)],
            "last": [torch.zeros(3, 4, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)],
        },
    }[op]


STATE = [
    ("residual", torch.zeros(701), "residual is"),
    ("residual", torch.zeros(1, 700), "residual is"),
    ("residual", torch.zeros(700, dtype=BF16), "residual is"),
    ("residual", torch.zeros(1400)[::2], "residual is"),
    ("residual", torch.zeros(700, device=META), r"residual is .* on meta, .*: expected contiguous torch.float32 \[700\] on cpu"),
    ("threshold", torch.ones(1), "threshold is"),
    ("threshold", torch.ones(2, dtype=torch.float64), "threshold is"),
    ("threshold", torch.ones(1).expand(2), r"threshold is .* strides \(0,\)"),
    ("threshold", torch.ones(2, device=META), "threshold is"),
    ("counters", torch.zeros(10, dtype=torch.int64), r"counters is torch.int64 \[10\].*: expected contiguous torch.int64 \[2, 5\]"),
    ("counters", torch.zeros(2, 5), "counters is"),
    ("counters", torch.zeros(2, 5, dtype=torch.int32), "counters is"),
    ("counters", torch.zeros(5, 2, dtype=torch.int64).T, "counters is"),
]
GRADIENTS = [
    ("grad", torch.zeros(799), "grad is"),
    ("grad", torch.zeros(1, 810), r"grad is torch.float32 \[1, 810\]: expected"),
    ("grad", torch.zeros(810, dtype=torch.float64), "grad is"),
    *STATE,
]
BAD: list[tuple[Any, str, Any, str]] = [
    *[(op, *case) for op in (select_threshold, threshold_pack) for case in GRADIENTS],
    *[(repack, name, value, message) for name, value, message in STATE if name != "residual"],
    (repack, "residual", torch.zeros(OWNED.state_numel + 1), "residual is"),
    (repack, "gathered", bytes_of(OWNED.chunk_bytes - 4), "gathered is"),
    (repack, "layout", WHOLE, "a bucket of 700 elements cannot hold its segments, which reach to 800"),
    (unpack_accumulate, "gathered", bytes_of(WHOLE.chunk_bytes), "gathered is"),
    (unpack_accumulate, "gathered", bytes_of(1, WHOLE.payload_bytes), "gathered is"),
    (unpack_accumulate, "gathered", bytes_of(WHOLE.payload_bytes).char(), "gathered is"),
    (unpack_accumulate, "dense", torch.zeros(111), "dense has 111 elements: 110 are not covered"),
    (unpack_accumulate, "dense", torch.zeros(110, dtype=torch.float64), "dense is torch.float64"),
    (unpack_accumulate, "dense", torch.zeros(110, device=META), "dense is torch.float32 on meta"),
    *[(unpack_accumulate, "numel", numel, f"a bucket of {numel} elements cannot hold its segments") for numel in (799, 0, -1)],
    (unpack_into, "gathered", bytes_of(WHOLE.chunk_bytes), "gathered is"),
    (unpack_into, "dense", torch.zeros(111), "dense has 111 elements: 110 are not covered"),
    (unpack_into, "out", torch.zeros(799), "a bucket of 799 elements cannot hold its segments"),
    (unpack_into, "out", torch.zeros(810, dtype=torch.int8), "dtype is torch.int8: expected one of"),
    (unpack_into, "out", torch.zeros(1, 810), r"out is \[1, 810\], contiguous, on cpu: expected one dimension"),
    (unpack_into, "out", torch.zeros(1620)[::2], r"out is \[810\], not contiguous, on cpu: expected"),
    (unpack_into, "out", torch.zeros(810, device=META), r"out is \[810\], contiguous, on meta: expected .* on cpu"),
    (unpack_accumulate, "dtype", torch.int8, "dtype is torch.int8: expected one of"),
    *[(unpack_accumulate, "divisor", divisor, f"divisor is {divisor}: expected an integer from 1") for divisor in (0, -2)],
    (pack_rows, "x", torch.zeros(4, 80), r"rows are \[4, 80\], expected R by \[2, 40\]"),
    (pack_rows, "method", "sampled", "method 'sampled' is not one of"),
    *[(pack_rows, "density", density, f"density {density} is outside") for density in (0.0, -0.5, 1.5, float("nan"))],
    *[
        (pack_rows, "fixed", fixed, re.escape(f"fixed threshold {fixed} is negative, NaN, or above"))
        for fixed in (-1.0, float("nan"), 1e39)
    ],
    (unpack_rows, "payload", bytes_of(4, 29), r"payload is torch.uint8 \(4, 29\), expected uint8 \[rows, 30\]"),
    (unpack_rows, "payload", bytes_of(120), "payload is"),
    (unpack_rows, "payload", bytes_of(4, 30).char(), "payload is"),
    *[(unpack_rows, "addends", addends, f"addends is {addends}: expected an integer from 1") for addends in (0, -1)],
    (unpack_rows, "addends", 3, "payload has 4 rows, expected a multiple of 3"),
    (gather_rows, "grad", torch.zeros(0, 2, 40), "payload has 4 rows, expected a multiple of 0"),
    (gather_rows, "payload", bytes_of(4, 30).to(META), "payload is on meta: expected cpu"),
    (gather_rows, "value_dtype", torch.int8, "value dtype is torch.int8"),
    (scatter_rows, "values", torch.zeros(8, 9), r"values are \(8, 9\), expected \(8, 10\)"),
    (scatter_rows, "values", torch.zeros(4, 10), r"values are \(4, 10\), expected \(8, 10\)"),
    (scatter_rows, "values", torch.zeros(8, 10, dtype=torch.float64), "value dtype is"),
    (scatter_rows, "addends", 0, "addends is 0"),
    (quantize_rows, "x", torch.zeros(4, 2, 0), r"rows are \(4, 2, 0\), expected one element or more in each"),
    (quantize_rows, "seed", torch.tensor([7, 8]), "seed is"),
    (quantize_rows, "seed", torch.zeros(1, dtype=torch.int64, device=META), "seed is on meta: expected cpu"),
    (quantize_rows, "bits", 0, "bits 0 is not 8 or 4"),
    (dequantize_rows, "row_shape", [], "row_shape is empty"),
    (dequantize_rows, "row_shape", [-2, -1, 40], r"row_shape is \[-2, -1, 40\]: expected sizes"),
    (dequantize_rows, "row_shape", [2, 0], r"row_shape is \[2, 0\]: expected sizes"),
    (dequantize_rows, "row_shape", [3, 40], "payload is"),
    (dequantize_rows, "dtype", torch.int32, "dtype of the rows is"),
    (store, "value", torch.ones(6), "value is"),
    (prepare_moments, "scalars", torch.zeros(4), r"scalars is torch.float32 \[4\]: expected contiguous float32 or float64 \[5\]"),
    (prepare_moments, "scalars", torch.zeros(5, dtype=BF16), "scalars is torch.bfloat16"),
    (prepare_moments, "shares", torch.zeros(9, dtype=torch.float64), "shares is torch.float64"),
    (prepare_moments, "shares", torch.zeros(1), r"shares is torch.float32 \[1\]"),
    (prepare_moments, "shares", None, "there are no shares: expected"),
    (prepare_moments, "last", [], "second has 2 tensors, last 0"),
    (prepare_moments, "first", [torch.zeros(3, 4)], "first has 1 tensors: expected none, or 2 as grads"),
    (
        prepare_moments,
        "grads",
        [torch.zeros(3, 4), torch.zeros(7).int()],
        r"grads\[1\] is torch.int32 \[7\] on cpu: expected floating point",
    ),
    (prepare_moments, "first", [torch.zeros(4, 3), torch.zeros(7)], r"first\[0\] is torch.float32 \[4, 3\] on cpu: expected .* \[3, 4\]"),
    (prepare_moments, "parameters", [torch.zeros(3, 4), torch.zeros(7, device=META)], r"parameters\[1\] is .* on meta"),
    (prepare_moments, "last", [torch.zeros(3, 4), torch.zeros(7).int()], r"last\[0\] is torch.float32 \[3, 4\] on cpu: expected int32"),
]
OPS = [select_threshold, threshold_pack, unpack_accumulate, repack, pack_rows, unpack_rows, gather_rows, scatter_rows]
OPS += [quantize_rows, dequantize_rows, store, prepare_moments]


def call_fake(op: Any, *arguments: Any) -> Any:
    with FakeTensorMode() as mode:
        return op(*tree_map_only(Tensor, mode.from_tensor, arguments))


@pytest.fixture(params=["compiled", "reference", "fake"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls an operator: its C++ kernel, its reference, or its fake."""
    if request.param == "compiled" and load_library() is None:
        pytest.skip("no C++ compiler")
    if request.param == "reference":
        monkeypatch.setattr("dct_compile.ops.library.is_ready", lambda: False)
    return call_fake if request.param == "fake" else lambda op, *arguments: op(*arguments)


@pytest.mark.parametrize(("op", "name", "value", "message"), BAD, ids=lambda item: str(item)[:30])
def test_a_wrong_argument_is_named(op: Any, name: str, value: Any, message: str, call: Callable[..., Any]) -> None:
    arguments = good(op)
    assert name in arguments
    with pytest.raises(ValueError, match=message):
        call(op, *{**arguments, name: value}.values())


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_other_arguments_are_good(op: Any, call: Callable[..., Any]) -> None:
    call(op, *good(op).values())


def test_without_error_feedback_the_residual_is_not_looked_at(call: Callable[..., Any]) -> None:
    for op in (select_threshold, threshold_pack):
        call(op, *{**good(op), "residual": torch.zeros(0), "error_feedback": False}.values())


@pytest.mark.parametrize("segments", [(), ((0, 0),), ((3, 0), (3, 0))])
def test_empty_buckets(segments: tuple[tuple[int, int], ...], call: Callable[..., Any]) -> None:
    whole, owned = (GradientLayout(segments, 256, 2, chunk, 0.3, torch.int8) for chunk in (-1, 1))
    parts = (torch.zeros(0), torch.ones(len(segments)), torch.zeros(len(segments), 5, dtype=torch.int64))
    grad = torch.zeros(3 * len(segments))
    for selection in (SELECTION, FIXED):
        call(select_threshold, grad, *parts, whole, selection, True)
        assert call(repack, bytes_of(3 * owned.payload_bytes), *parts, owned, selection, True).shape == (owned.payload_bytes,)
    assert call(threshold_pack, grad, *parts, whole, True).shape == (whole.payload_bytes,)
    gathered = bytes_of(2 * whole.payload_bytes)
    assert call(unpack_accumulate, gathered, grad.clone(), grad.numel(), BF16, whole, 2).shape == grad.shape


@pytest.mark.parametrize("shape", [(0, 2, 40), (4, 0, 40)])
def test_empty_rows(shape: tuple[int, ...], call: Callable[..., Any]) -> None:
    rows, *inner = shape
    layout, x = RowLayout(tuple(inner), 5, BF16), torch.zeros(shape)
    payload = call(pack_rows, x, layout, "laplace", 0.1, 0.0)
    assert payload.shape == (rows, 15 * inner[0])
    payload = bytes_of(*payload.shape)
    assert call(unpack_rows, payload, layout, 2, BF16).shape == (rows // 2, *inner)
    assert call(gather_rows, x, payload, layout, BF16).shape == (rows, 5 * inner[0])
    assert call(scatter_rows, torch.zeros(rows, 5 * inner[0]), payload, layout, 1, BF16).shape == shape
    codes = call(quantize_rows, x, torch.tensor([7]), 4)
    assert call(dequantize_rows, bytes_of(*codes.shape), inner, 4, BF16).shape == shape
