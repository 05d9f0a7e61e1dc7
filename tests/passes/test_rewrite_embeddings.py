"""Rewriting of embedding exchanges to quantised rows."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.passes.graph_utils import WAIT
from tests.lockstep import run_both, trace_all
from tests.small_models import all_reduce, c10d, exchange, gather, ids, reduce_scatter
from tests.tracing import communication, dct, nodes_of, trace

A2A, AG = c10d.all_to_all_single.default, c10d.all_gather_into_tensor.default
QUANTIZE, DEQUANTIZE = dct.quantize_rows.default, dct.dequantize_rows.default


@pytest.mark.parametrize(("codec", "steps"), [("int8", 127), ("int4", 7)])
def test_quantised_exchange(codec: str, steps: int) -> None:
    table = nn.Embedding(8, 64)
    everyone = trace_all(lambda index: exchange(table(index)), ids(16), embedding_codec=codec)
    counts = communication(everyone[0].after)
    assert counts == {QUANTIZE: 2, A2A: 2, WAIT: 2, DEQUANTIZE: 2}
    for dense, compressed in zip(*run_both(everyone), strict=True):
        step = dense[0].abs().amax(1, keepdim=True) / steps * 1.01
        assert ((compressed[0] - dense[0]).abs() <= step).all()
        assert not torch.equal(compressed[0], dense[0])


@pytest.mark.parametrize(
    ("collective", "wanted"),
    [
        (gather, {QUANTIZE: 2, AG: 1, A2A: 1, WAIT: 2, DEQUANTIZE: 2}),
        (reduce_scatter, {QUANTIZE: 2, A2A: 1, AG: 1, WAIT: 2, DEQUANTIZE: 2}),
        (all_reduce, {QUANTIZE: 2, AG: 2, WAIT: 2, DEQUANTIZE: 2}),
    ],
)
def test_quantised_reductions_are_summed_after_decoding(collective: Callable[[Tensor], Tensor], wanted: Mapping[Any, int]) -> None:
    table = nn.Embedding(8, 64)
    everyone = trace_all(lambda index: collective(table(index)), ids(16))
    assert communication(everyone[0].after) == wanted
    for dense, compressed in zip(*run_both(everyone), strict=True):
        for one, other in zip(dense, compressed, strict=True):
            if one is not None:
                torch.testing.assert_close(other, one, rtol=0, atol=0.1 * float(one.abs().max()))


def test_seed_is_made_of_the_data() -> None:
    """No generator of torch is touched; forward and backward, and every site, round differently."""
    table = nn.Embedding(8, 64)
    traced = trace(lambda index: exchange(exchange(table(index)).view(16, 64)), ids(16))
    everyone = trace_all(lambda index: exchange(table(index)), ids(16))
    before = torch.get_rng_state()
    first, second = run_both(everyone)[1], run_both(everyone)[1]
    seeds = [node.args[1] for node in nodes_of(traced.after, QUANTIZE)]
    assert len({seed.args[0].args[1] for seed in seeds}) == len(seeds)
    assert not any("rand" in str(node.target) for node in traced.after.nodes)
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(torch.get_rng_state(), before)
