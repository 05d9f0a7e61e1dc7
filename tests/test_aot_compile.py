"""``torch.compile(...).aot_compile``: a graph that sends nothing encoded is saved as by Inductor, any other is an error that says why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from tests.small_models import exchange, leaf

pytestmark = pytest.mark.usefixtures("fake_group_of_two")
LAYER = nn.Linear(64, 64)


@torch.library.custom_op("dct_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator that might communicate, for all that can be seen."""
    return x * 2


twice.register_fake(torch.empty_like)


def ahead_of_time(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    compiled: Any = torch.compile(function, fullgraph=True, backend=dct, options=options or None)
    return compiled.aot_compile((inputs, {}))


WITHOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "plain operators": lambda x: (x @ x.t()).sin(),
    "an operator that is not known": lambda x: twice(x).sin(),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_graph_without_collectives_is_saved_and_loaded(case: str, tmp_path: Path) -> None:
    x, path = torch.randn(16, 64), tmp_path / "saved"
    compiled = ahead_of_time(WITHOUT[case], x)
    torch.testing.assert_close(compiled(x), WITHOUT[case](x))
    compiled.save_compiled_function(str(path))
    torch._dynamo.reset()
    with path.open("rb") as file:
        loaded = torch.compiler.load_compiled_function(file)
    torch.testing.assert_close(loaded(x), WITHOUT[case](x))


def test_dense_collectives_are_saved_and_reported(tmp_path: Path) -> None:
    compiled = ahead_of_time(lambda x: exchange(x.relu()), leaf(16, 64))
    compiled.save_compiled_function(str(tmp_path / "saved"))
    assert [site.decision for site in dct_compile.report().sites] == ["dense", "dense"]


def test_compressed_collectives_are_an_error_that_names_them() -> None:
    with pytest.raises(RuntimeError, match=r"aot_compile cannot save .* \['small_models.py:\d+'\]\. .*'exempt', 'mp_density': 1"):
        ahead_of_time(lambda x: exchange(x.relu()).sin(), torch.randn(16, 64))
    assert ahead_of_time(lambda x: exchange(x.relu()).sin(), torch.randn(16, 64), exempt=["small_models.py:*"]) is not None


def test_averaging_of_gradients_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="aot_compile cannot save a graph with option 'data_parallel'"):
        ahead_of_time(lambda x: LAYER(x), torch.randn(16, 64), data_parallel=True)
