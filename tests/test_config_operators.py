"""Options as the operators get them."""

import math

import pytest
import torch

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.config import DCTConfig
from dct_compile.triton_kernels.layout import GradientLayout, Selection

EXTREME = {"threshold": 3.4e38, "capacity_factor": 3.4e38, "refresh_interval": 2**63 - 1, "dp_density": 5e-324, "min_numel": 0}


@pytest.mark.parametrize("method", ["exact", "sampled", "laplace", 3.4e38])
def test_operators_take_the_largest_values(method: str | float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both implementations, with the values as schemes hand them on."""
    config = DCTConfig(**{**EXTREME, "threshold": method})
    selection = Selection(config.dp_density, config.threshold_method, config.fixed_threshold, config.refresh_interval, "geometric")
    layout = GradientLayout(((0, 9),), 256, 1, -1, min(1.0, config.dp_density * config.capacity_factor), config.dp_dtype)
    chosen = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("dct_compile.ops.library.is_ready", lambda: False)
        state = torch.zeros(9), torch.ones(1), torch.zeros(1, 5, dtype=torch.int64)
        torch.ops.dct.select_threshold(torch.arange(9.0), *state, layout, selection, True)
        torch.ops.dct.threshold_pack(torch.arange(9.0), *state, layout, True)
        chosen.append(float(state[1]))
    assert chosen[0] == chosen[1]
    assert math.isfinite(chosen[0])


def test_threshold_as_the_operators_want_it() -> None:
    assert [
        (config.threshold_method, config.fixed_threshold) for config in (DCTConfig(), DCTConfig(threshold=0.5), DCTConfig(threshold=2))
    ] == [
        ("exact", 0.0),
        ("fixed", 0.5),
        ("fixed", 2.0),
    ]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes_as_the_operators_want_them(name: str) -> None:
    config = DCTConfig(dp_value_dtype=name, mp_value_dtype=name)
    assert config.dp_dtype is config.mp_dtype is getattr(torch, name)


def test_gradient_values_may_be_int8() -> None:
    assert DCTConfig(dp_value_dtype="int8").dp_dtype is torch.int8
