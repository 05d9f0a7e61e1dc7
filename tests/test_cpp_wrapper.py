"""Inductor's option ``cpp_wrapper``: an error that names it where an exchange is compressed; all else compiles as by Inductor."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from tests.small_models import all_reduce

pytestmark = pytest.mark.usefixtures("fake_group_of_two")


def reduced(x: Tensor) -> Tensor:
    return torch.tanh(all_reduce(torch.sin(x)))


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "activation": (reduced, {}, "small_models.py:"),
    "gradient": (nn.Linear(64, 64), {"data_parallel": True, "min_numel": 0}, "bias +1"),
    "gradient by powersgd": (nn.Linear(64, 64), {"data_parallel": True, "min_numel": 0, "gradient_scheme": "powersgd"}, "bias +1"),
}


@pytest.mark.parametrize("by_option", [True, False], ids=["option", "configuration"])
@pytest.mark.parametrize("case", CASES)
def test_compressed_exchanges_are_refused(case: str, by_option: bool) -> None:
    function, options, name = CASES[case]
    given = {"cpp_wrapper": True} if by_option else {}
    with nullcontext() if by_option else inductor_config.patch(cpp_wrapper=True), pytest.raises(RuntimeError) as caught:
        torch.compile(function, backend=dct, options={"link": None, **given, **options})(torch.randn(8, 64, requires_grad=True))
    assert isinstance(caught.value, torch._dynamo.exc.BackendCompilerFailed)
    error = caught.value.inner_exception
    assert type(error) is ValueError
    assert "option 'cpp_wrapper' is True" in str(error)
    assert name in str(error)
    assert "Set it to False, or leave them dense" in str(error)


def test_dense_exchanges_compile() -> None:
    compiled = torch.compile(reduced, backend=dct, options={"cpp_wrapper": True, "activation_codec": "dense"})
    assert compiled(torch.randn(8, 64)).shape == (8, 64)
    assert [site.decision for site in dct_compile.report().sites] == ["dense"]
