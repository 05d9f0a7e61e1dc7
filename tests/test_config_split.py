"""Options of torch.compile are this project's or Inductor's; a key that neither knows is refused."""

from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo import register_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import list_options

from dct_compile.backend import dct
from dct_compile.config import DCTConfig
from dct_compile.options import default_options, split_options
from tests.ranks import fresh_compiler


@pytest.mark.parametrize("options", [None, {}])
def test_no_options(options: dict[str, Any] | None) -> None:
    assert split_options(options, list_options()) == (DCTConfig(), {})


def test_defaults_are_listed() -> None:
    assert DCTConfig(**default_options()) == DCTConfig()
    assert set(default_options()) == {item.name for item in fields(DCTConfig)}


def test_options_of_inductor_are_passed_on() -> None:
    config, inductor = split_options({"mp_density": 0.1, "max_autotune": True, "triton.cudagraphs": False}, list_options())
    assert config == DCTConfig(mp_density=0.1)
    assert inductor == {"max_autotune": True, "triton.cudagraphs": False}


def test_dashes_are_underscores_as_for_inductor() -> None:
    assert split_options({"max-autotune": True}, list_options())[1] == {"max_autotune": True}


def test_no_option_of_inductor_is_hidden() -> None:
    assert not {item.name for item in fields(DCTConfig)} & set(list_options())


@pytest.mark.parametrize(("key", "near"), [("mp_densty", "'mp_density'"), ("max_autotun", "'max_autotune'"), ("density", "'mp_density'")])
def test_unknown_options_are_refused(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown option '{key}' \\(value 0.1\\) for backend 'dct'") as error:
        split_options({key: 0.1}, list_options())
    text = str(error.value)
    assert near in text.partition("Did you mean ")[2]
    assert all(item.name in text for item in fields(DCTConfig))
    assert "the options of Inductor" in text


def test_unknown_option_without_a_neighbour() -> None:
    with pytest.raises(ValueError, match="unknown option 'zzzzz'") as error:
        split_options({"zzzzz": 1}, ["max_autotune"])
    assert "Did you mean" not in str(error.value)


def test_a_name_of_its_own_brings_its_options() -> None:
    """Where a trainer asks for the name of a backend alone, as docs/howto/trainers.md says."""
    register_backend(partial(dct, options={"dp_density": 2}), name="dct_of_this_test")
    with fresh_compiler(), pytest.raises(BackendCompilerFailed, match=r"option 'dp_density' is 2 \(int\)"):
        torch.compile(torch.nn.Linear(2, 2), backend="dct_of_this_test")(torch.randn(1, 2))
