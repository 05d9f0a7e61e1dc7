"""The record of each parameter's gradients: which there are, and what a look at the gradients tells."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.state.gradient_use import GradientUse, Use
from dct_compile.state.gradient_use import _note as note_group


class OnDevice:
    """A gradient that says it is on a GPU, where nothing may be read by the host."""

    is_cuda = True

    def __init__(self, values: Tensor) -> None:
        self.any = values.any


@pytest.mark.parametrize("wrap", [lambda values: values, OnDevice], ids=["host", "device"])
@pytest.mark.parametrize(
    ("values", "blank", "absent"), [((0, 1), 0, False), ((1, 0), 0, False), ((0, 0), 0, True), ((0, 0), 1, True), ((0, 0), 2, False)]
)
def test_any_gradient_stands_for_those_of_its_optimizer(wrap: Any, values: tuple[int, ...], blank: int, absent: bool) -> None:
    """``blank``: how many of the two were handed out as zeros."""
    held = [SimpleNamespace(grad=wrap(torch.full((4,), float(value)))) for value in values]
    uses = [Use(lambda parameter=parameter: parameter, blank=torch.tensor(index < blank)) for index, parameter in enumerate(held)]  # type: ignore[misc]
    note_group(uses)
    assert [bool(use.absent) for use in uses] == [absent] * 2


def test_records_of_dead_parameters_are_dropped() -> None:
    use = GradientUse()
    parameter = nn.Parameter(torch.ones(2))
    use.of([parameter])
    del parameter
    gc.collect()
    other: Tensor = nn.Parameter(torch.ones(2))
    assert len(use.of([other])) == len(use._uses) == 1


def test_a_search_lets_other_threads_add_parameters() -> None:
    use, added = GradientUse(), []

    class Adding(Use):
        @property
        def is_due(self) -> bool:
            added.append(nn.Parameter(torch.ones(2)))
            use.of(added)
            return super().is_due

    parameter = nn.Parameter(torch.ones(2))
    use._uses = {id(parameter): Adding(weakref.ref(parameter))}
    use.look([parameter])
    assert all(use.find(item) is not None for item in (parameter, *added))


def test_all_that_is_watched_is_looked_at_in_one_backward() -> None:
    """Two DDP modules whose gradients one backward makes, as those of a generator and its critic."""
    use = GradientUse()
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    handles = [handle for parameter in parameters for handle in use.watch([parameter])]
    for item in use.of(parameters):
        item.note_exchange()
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    assert [item.absent for item in use.of(parameters)] == [True, True]
    for handle in handles:
        handle.remove()
    assert not any(parameter._backward_hooks for parameter in parameters)
