"""An exchange is masked only together with its backward."""

from typing import Any

import torch

from tests.small_models import Weighted, exchange, leaf
from tests.tracing import trace


def test_a_forward_is_masked_only_together_with_its_backward() -> None:
    """[Gupta21]: what was not sent gets no gradient. Here the gradient of an exchanged parameter is its exchange's backward."""

    class Scaled(Weighted):
        def forward(self, x: torch.Tensor) -> Any:
            return x @ exchange(self.weight * 2)

    codecs = trace(Scaled(), torch.randn(16, 64)).schemes
    assert codecs in (["dense", "dense"], ["row_threshold", "row_threshold"])


class HandWritten(torch.autograd.Function):
    """An exchange with its backward written by hand, as model-parallel libraries do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return exchange(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return exchange(gradient)


class TwoHandWritten(torch.autograd.Function):
    """Two exchanges in one function: autograd gives them one sequence number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return exchange(x), exchange(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return exchange(gradients[0]), exchange(gradients[1])


def test_hand_written_exchanges_are_masked_only_together_with_their_backward() -> None:
    single = trace(lambda x: HandWritten.apply(x.relu()).sin(), leaf(16, 64))  # type: ignore[no-untyped-call]
    double = trace(lambda x, y: torch.stack(TwoHandWritten.apply(x.relu(), y.tanh())).sin(), leaf(16, 64), leaf(16, 64))  # type: ignore[no-untyped-call]
    for traced in (single, double):
        forward = [item.site for item in traced.decisions if item.scheme == "row_threshold" and item.site.kind == "activation"]
        masked = [item.site.twin for item in traced.decisions if item.scheme == "row_threshold" and item.site.kind == "activation_gradient"]
        assert len(forward) == len(masked)
        assert all(site in masked for site in forward)
