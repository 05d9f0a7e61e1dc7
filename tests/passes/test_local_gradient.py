"""The gradient behind an all_reduce that sends nothing backward: it is masked only if all of it comes from there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.lockstep import run_both, trace_all
from tests.small_models import ColumnParallel, SumOfParts, all_reduce, leaf
from tests.tracing import Trace, communication, dct, trace

MASKS = {dct.gather_rows.default, dct.scatter_rows.default}


def by_default(function: Callable[..., Any]) -> Trace:
    return trace(function, leaf(16, 64), activation_codec="auto", mp_outputs=False)


def test_only_way_of_a_gradient_is_masked() -> None:
    traced = by_default(lambda x: SumOfParts.apply(x.relu()).sin())  # type: ignore[no-untyped-call]
    assert traced.schemes == ["row_threshold"]
    assert communication(traced.after).keys() >= MASKS


def _beside(x: Tensor) -> tuple[Any, Tensor]:
    hidden = x.relu()
    return SumOfParts.apply(hidden).sin(), (hidden @ torch.ones(64, 64)).sin()  # type: ignore[no-untyped-call]


def _returned(x: Tensor) -> tuple[Any, Tensor]:
    hidden = x.relu()
    return SumOfParts.apply(hidden).sin(), hidden  # type: ignore[no-untyped-call]


def _statistic(x: Tensor) -> tuple[Tensor, Tensor]:
    hidden = x.relu()
    with torch.no_grad():
        used = all_reduce(hidden).abs().mean()
    return (hidden @ torch.ones(64, 64)).sin(), used


def _detached(x: Tensor) -> Tensor:
    hidden = x.relu()
    return (hidden @ torch.ones(64, 64)).sin() / (1 + all_reduce(hidden.detach()).abs().mean())


def _behind_another_layer(x: Tensor) -> tuple[Tensor, Tensor]:
    y = (ColumnParallel.apply(x.sin()) @ torch.ones(64, 64)).relu()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        used = all_reduce(y).abs().mean()
    return y * 2, used


BRANCHES = [_beside, _returned, _statistic, _detached, _behind_another_layer]


@pytest.mark.parametrize("function", BRANCHES)
def test_gradient_of_other_branches_is_not_masked(function: Callable[[Tensor], Any]) -> None:
    traced = by_default(function)
    assert traced.decisions[0].reason.startswith("int8 rows with stochastic rounding")
    assert not communication(traced.after).keys() & MASKS
    assert all(item.site.local_gradient is None and item.site.twin is None for item in traced.decisions if item.site is not None)


def test_a_statistic_changes_no_gradient() -> None:
    everyone = trace_all(_statistic, leaf(16, 64), activation_codec="threshold")
    for dense, compressed in zip(*run_both(everyone), strict=True):
        torch.testing.assert_close(compressed[-1], dense[-1], rtol=0, atol=0)
