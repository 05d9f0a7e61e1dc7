"""The values that operators take as one argument: in graphs, in generated code, in Inductor's cache."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from dct_compile.ops import pack_rows, select_threshold, threshold_pack
from dct_compile.triton_kernels.layout import GradientLayout, RowLayout, Selection
from dct_compile.triton_kernels.values import Value
from tests.ranks import fresh_compiler

LAYOUT = GradientLayout(((3, 400), (500, 300)), 256, 1, -1, 0.3, torch.bfloat16)
SELECTION = Selection(0.1, "exact", 0.0, 10, "geometric")
ROWS = RowLayout((2, 40), 5, torch.bfloat16)
VALUES = [LAYOUT, SELECTION, ROWS]
PRINTED = [
    "GradientLayout.of(segments=((3, 400), (500, 300)), block=256, chunks=1, chunk=-1, capacity_fraction=0.3, value_dtype=torch.bfloat16)",
    "Selection.of(density=0.1, method='exact', fixed=0.0, refresh_interval=10, refresh_warmup='geometric', hold=False)",
    "RowLayout.of(row_shape=(2, 40), capacity=5, value_dtype=torch.bfloat16)",
]


def state() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(700), torch.ones(2), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(("value", "printed"), list(zip(VALUES, PRINTED, strict=True)), ids=[type(value).__name__ for value in VALUES])
def test_a_value_is_printed_as_the_expression_that_makes_it(value: Value, printed: str) -> None:
    text, names = value.__fx_repr__()
    assert text == printed
    made = eval(text, {"torch": torch, **names})
    assert made == value
    assert hash(made) == hash(value)
    assert made is eval(text, {"torch": torch, **names}), "what has been computed for a layout is kept from call to call"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_pickled_without_what_it_has_computed(value: Value) -> None:
    before = pickle.dumps(value)
    assert hash(value) == hash(pickle.loads(before))
    assert LAYOUT.payload_bytes > 0
    assert pickle.dumps(value) == before
    assert pickle.loads(before) == value


def reduce(grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor) -> Tensor:
    select_threshold(grad, residual, threshold, counters, LAYOUT, SELECTION, True)
    return threshold_pack(grad, residual, threshold, counters, LAYOUT, True)  # type: ignore[no-any-return]


def test_a_traced_graph_can_be_printed_and_run() -> None:
    grad = torch.randn(810)
    traced = make_fx(reduce, tracing_mode="fake")(grad, *state())
    assert f"{PRINTED[0]}, {PRINTED[1]}, True" in traced.code
    assert torch.equal(traced(grad, *state()), reduce(grad, *state()))


def test_inductor_prints_values_in_its_code() -> None:
    grad, kept = torch.randn(810), state()
    with fresh_compiler():
        result, code = run_and_get_code(torch.compile(reduce, fullgraph=True), grad, *kept)
    assert f"{PRINTED[0]}, {PRINTED[1]}, True" in code[0]
    expected = state()
    assert torch.equal(result, reduce(grad, *expected))
    for a, b in zip(kept, expected, strict=True):
        assert torch.equal(a, b)


def test_another_value_is_another_graph() -> None:
    def pack(x: Tensor, layout: RowLayout) -> Tensor:
        return pack_rows(x, layout, "exact", 1.0, 0.0)  # type: ignore[no-any-return]

    with fresh_compiler():
        compiled = torch.compile(pack, backend="aot_eager", fullgraph=True)
        layouts = [RowLayout((40,), capacity, torch.float32) for capacity in (5, 7)]
        assert [compiled(torch.randn(3, 40), layout).shape for layout in layouts] == [(3, 25), (3, 35)]


CACHED = """
import sys
import torch
from torch._dynamo.utils import counters
from tests.test_values import reduce, state
torch.compile(reduce, fullgraph=True)(torch.randn(810), *state())
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_another_process_finds_the_graph_in_inductors_cache(tmp_path: Path) -> None:
    path = os.pathsep.join(folder for folder in sys.path if folder)
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_AUTOGRAD_CACHE": "0", "PYTHONPATH": path}
    runs = [subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]], runs[1].stderr
