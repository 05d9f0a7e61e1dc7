"""Rewriting of activations to quantised rows and quantised sums: each value is within a step of the exact one, for all geometries."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dct_compile.passes.graph_utils import WAIT
from dct_compile.schemes.quantized import WIDEST
from tests.lockstep import run_both, trace_all
from tests.small_models import all_reduce, c10d, exchange, gather, leaf, reduce_scatter
from tests.tracing import communication, dct, nodes_of, trace

A2A, AG = c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default
QUANTIZE, DEQUANTIZE = dct.quantize_rows.default, dct.dequantize_rows.default


def check(function: Callable[[Tensor], Tensor], x: Tensor, ranks: int, steps: float, **options: Any) -> Any:
    """Compares the results and gradients of all ranks with those of the dense graphs. ``steps``: of 1/127 of the largest, allowed."""
    everyone = trace_all(function, x, ranks=ranks, **{"activation_codec": "int8", **options})
    for dense, compressed in zip(*run_both(everyone), strict=True):
        for exact, found in zip(dense, compressed, strict=True):
            assert found.shape == exact.shape
            assert found.dtype == exact.dtype
            error = (found.float() - exact.float()).abs().max()
            assert 0 < error < steps * exact.float().abs().max() / 127
    return everyone


def test_sum_in_two_steps() -> None:
    everyone = check(lambda x: all_reduce(x.sin()), leaf(16, 64), 4, 8)
    assert communication(everyone[0].after) == {QUANTIZE: 4, A2A: 2, AG: 2, WAIT: 4, DEQUANTIZE: 4}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_ranks_get_the_same_sum(ranks: int) -> None:
    everyone = trace_all(lambda x: all_reduce(x.sin()), leaf(7, 64), ranks=ranks, activation_codec="int8")
    results = run_both(everyone)[1]
    assert all(torch.equal(result[0], results[0][0]) for result in results)


@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (5, 3, 64), (4, 2, 3, 16), (3, 10)])
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_sums_of_any_number_of_rows(shape: tuple[int, ...], op: str) -> None:
    check(lambda x: all_reduce(x.sin(), op), leaf(*shape) if op == "sum" else torch.randn(*shape), 3, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_short_floats(dtype: torch.dtype) -> None:
    check(lambda x: all_reduce(x.sin()), leaf(16, 64, dtype=dtype), 3, 8)


@pytest.mark.parametrize("collective", [exchange, gather, reduce_scatter])
@pytest.mark.parametrize("shape", [(12, 64), (6, 5, 16), (6, 1, 2, 8)])
def test_rows_of_every_collective(collective: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    check(lambda x: collective(x.sin()), leaf(*shape), 3, 4)


def test_wide_rows_are_cut_into_blocks() -> None:
    everyone = check(lambda x: gather(x.sin()), leaf(2, 3 * WIDEST // 2), 2, 4)
    assert everyone[0].decisions[0].offer.coding.block == 3 * WIDEST // 4
    check(lambda x: all_reduce(x.sin()), leaf(2, 2 * WIDEST), 3, 8)


@pytest.mark.parametrize("collective", [exchange, gather, all_reduce])
def test_bfloat16_on_the_wire(collective: Callable[[Tensor], Tensor]) -> None:
    check(lambda x: collective(x.sin()), leaf(6, 5, 16), 2, 2, activation_codec="bfloat16")


@pytest.mark.parametrize("collective", [exchange, gather, reduce_scatter, all_reduce])
@pytest.mark.parametrize("dim", [0, 1])
def test_dynamic_sizes_stay_dynamic(collective: Callable[[Tensor], Tensor], dim: int) -> None:
    x = leaf(12, 6, 16)
    torch._dynamo.mark_dynamic(x, dim)
    traced = trace(lambda x: collective(x.sin()), x, ranks=3, activation_codec="int8")
    assert set(traced.schemes) <= {"quantized_rows", "quantized_sum"}
    assert not any(isinstance(node.meta["val"].shape[0], int) for node in nodes_of(traced.after, QUANTIZE))
    traced.after.lint()
