"""The row operators as torch sees them: schemas, fakes with a symbolic number of rows, argument checks, the fallback."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dct_compile.ops import dequantize_rows, gather_rows, pack_rows, quantize_rows, scatter_rows, unpack_rows
from dct_compile.triton_kernels.layout import RowLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([7])
BF16 = torch.bfloat16
LAYOUT = RowLayout((2, 40), 5, BF16)


EXACT = ("exact", 1.0, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dtype", DTYPES)
def test_opcheck_of_the_threshold_ops(dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    x = torch.randn(4, 2, 300).to(dtype)
    layout = RowLayout((2, 300), 9, value_dtype)
    torch.library.opcheck(pack_rows, (x, layout, *EXACT))
    torch.library.opcheck(pack_rows, (x.transpose(0, 2), RowLayout((2, 4), 2, value_dtype), "laplace", 0.3, 0.0))
    payload = pack_rows(x, layout, *EXACT)
    torch.library.opcheck(unpack_rows, (payload, layout, 2, dtype))
    torch.library.opcheck(gather_rows, (x[:2], payload, layout, torch.bfloat16))
    values = gather_rows(x, payload, layout, torch.bfloat16)
    torch.library.opcheck(scatter_rows, (values, payload[:2], layout, 2, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck_of_the_codec(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(4, 2, 33).to(dtype)
    torch.library.opcheck(quantize_rows, (x, SEED, bits))
    torch.library.opcheck(dequantize_rows, (quantize_rows(x, SEED, bits), [2, 33], bits, dtype))


def exchange(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
    """All six ops, as a boundary and its backward use them."""
    payload = pack_rows(x, LAYOUT, *EXACT)
    dense = unpack_rows(payload, LAYOUT, 1, torch.float32)
    summed = unpack_rows(torch.cat([payload, payload]), LAYOUT, 2, torch.float32)
    values = gather_rows(x, payload, LAYOUT, torch.float32)
    back = scatter_rows(values, payload, LAYOUT, 1, torch.float16)
    codes = quantize_rows(x, seed, 4)
    return payload, dense, summed, values, back, codes, dequantize_rows(codes, [2, 40], 4, torch.bfloat16)


def test_one_graph_serves_any_number_of_rows() -> None:
    compiled = torch.compile(exchange, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (6, 9, 2):
        x = torch.randn(rows, 2, 40)
        with torch.compiler.set_stance("default" if rows == 6 else "fail_on_recompile"):
            found = compiled(x, SEED)
        for a, b in zip(found, exchange(x, SEED), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(found[1] != 0, found[4] != 0)
    assert torch.equal(found[2], 2 * found[1])


def test_the_number_of_rows_may_be_unbacked() -> None:
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment):
        rows = environment.create_unbacked_symint()
        torch._check(rows >= 0)
        found = exchange(torch.empty_strided((rows, 2, 40), (80, 40, 1)), torch.zeros(1, dtype=torch.int64))
    assert [str(tensor.shape[0]) for tensor in found] == [str(rows)] * 7
    assert [tensor.shape[1:] for tensor in found] == [(30,), (2, 40), (2, 40), (10,), (2, 40), (44,), (2, 40)]


X = torch.zeros(4, 2, 40)
PAYLOAD = torch.zeros(4, 30, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (pack_rows, (X.double(), LAYOUT, *EXACT), "dtype of the rows is"),
        (pack_rows, (torch.zeros(40), LAYOUT, *EXACT), "rows are"),
        (pack_rows, (X, RowLayout((40,), 5, BF16), *EXACT), r"rows are \[4, 2, 40\], expected R by \[40\]"),
        (pack_rows, (X, LAYOUT, "median", 1.0, 0.0), "method 'median' is not"),
        (pack_rows, (X, LAYOUT, "laplace", 0.0, 0.0), "density 0.0 is outside"),
        (pack_rows, (X, LAYOUT, "fixed", 1.0, -1.0), "fixed threshold -1.0 is negative"),
        (unpack_rows, (PAYLOAD, RowLayout((2, 300), 5, BF16), 1, BF16), "payload is"),
        (unpack_rows, (PAYLOAD, LAYOUT, 3, BF16), "payload has 4 rows"),
        (unpack_rows, (PAYLOAD, LAYOUT, 1, torch.int32), "dtype of the rows is"),
        (gather_rows, (X[:3], PAYLOAD, LAYOUT, BF16), "payload has 4 rows"),
        (gather_rows, (X[:, :1], PAYLOAD, LAYOUT, BF16), r"rows are \[4, 1, 40\], expected R by \[2, 40\]"),
        (scatter_rows, (torch.zeros(4, 9), PAYLOAD, LAYOUT, 1, BF16), "values are"),
        (quantize_rows, (X, SEED, 3), "bits 3 is not"),
        (quantize_rows, (X, SEED.int(), 8), "seed is"),
        (dequantize_rows, (PAYLOAD, [2, 40], 8, BF16), "payload is"),
    ],
)
def test_a_wrong_argument_is_named(op: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(*arguments)


def test_without_a_compiler_the_references_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2, 40)
    expected = exchange(x, SEED)
    monkeypatch.setattr("dct_compile.ops.library.is_ready", lambda: False)
    for a, b in zip(exchange(x, SEED), expected, strict=True):
        assert torch.equal(a, b)
