"""What find_sites sees of gradients in traced graphs: whose they are, and in which order their elements lie."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.element_order import ElementOrder
from tests.small_models import Averaged, AveragedFlat, SummedAndDivided, Weighted, all_reduce
from tests.tracing import trace


@pytest.mark.parametrize("synchronise", [Averaged, SummedAndDivided, AveragedFlat])
def test_all_reduced_parameter_gradients_know_their_parameter(synchronise: type[torch.autograd.Function]) -> None:
    traced = trace(Weighted(synchronise), torch.randn(16, 64))
    assert traced.kinds == [("all_reduce", "gradient", "computed")]
    site = traced.decisions[0].site
    assert site.name == "weight"
    assert [(segment.parameter.name, segment.parameter.numel, segment.offset) for segment in site.segments] == [("weight", 4096, 0)]
    assert traced.inputs[site.segments[0].parameter.position].is_parameter


class AveragedTransposed(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient.t().contiguous().view(1, -1), "avg").view(gradient.t().shape).t()


def test_a_gradient_that_is_reduced_transposed_has_that_order() -> None:
    decision = trace(Weighted(AveragedTransposed), torch.randn(16, 64), gradient_scheme="gather").decisions[0]
    transposed = ElementOrder((64, 64), (1, 0))
    assert decision.site.segments[0].parameter.order == transposed
    assert decision.offer.state.orders == (transposed,)


class AveragedTwiceTransposed(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return all_reduce(gradient, "avg").t().clone().transpose(0, 1)


def test_a_gradient_that_is_transposed_back_is_row_major() -> None:
    decision = trace(Weighted(AveragedTwiceTransposed), torch.randn(16, 64)).decisions[0]
    assert [segment.parameter.order for segment in decision.site.segments] == [None]


class AveragedWithMore(Averaged):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        flat = all_reduce(torch.cat([gradient.new_ones(512), gradient.reshape(-1)]), "avg")
        return flat[512:].view(gradient.shape)


def test_part_of_a_reduced_buffer_is_not_taken_for_all_of_it() -> None:
    traced = trace(Weighted(AveragedWithMore), torch.randn(16, 64))
    segments = traced.decisions[0].site.segments
    assert [segment.offset for segment in segments] in ([], [512])


def test_expanded_gradient_is_not_longer_than_what_is_reduced() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(4, 4096))

        def forward(self, x: Tensor) -> Any:
            return x * Averaged.apply(self.rows.mean(0))

    for decision in trace(Shared(), torch.randn(16, 4096)).decisions:
        assert decision.site.tensor is not None
        assert sum(segment.parameter.numel for segment in decision.site.segments) <= decision.site.tensor.numel()


def test_gradient_of_a_parameter_used_twice_is_not_one_site() -> None:
    class Tied(Weighted):
        def forward(self, x: Tensor) -> Any:
            return super().forward(super().forward(x).relu())

    traced = trace(Tied(), torch.randn(16, 64))
    assert [kind for _, kind, _ in traced.kinds] == ["activation_gradient"] * 2
    assert traced.schemes == ["dense"] * 2
