"""Activation checkpointing over gloo ranks: what is exchanged again in the backward equals what the forward had."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.small_models import all_reduce, exchange, gather

pytestmark = pytest.mark.distributed


class Layers(nn.Module):
    """Three layers with an exchange in each. ``checkpoints``: whether the backward computes each of them again."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.checkpoints = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for collective, layer in zip((exchange, gather, all_reduce), self.layers, strict=True):

            def run(x: Tensor, collective=collective, layer=layer) -> Tensor:  # type: ignore[no-untyped-def]
                return torch.tanh(collective(torch.tanh(layer(x)))[:16] * x)

            x = checkpoint(run, x, use_reentrant=False) if self.checkpoints else run(x)
        return x.square()


def gradients(rank: int, world_size: int, codec: str, checkpoints: bool) -> tuple[list[Tensor], int, set[str]]:
    """Returns the result with the gradients, the bytes that are kept for the backward, and the decisions."""
    model = Layers(checkpoints)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(rank))
    y = torch.compile(model, backend=dct, options={"activation_codec": codec, "mp_density": 0.25, "link": None})(x)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    kept = [item for item in y.grad_fn.saved_tensors if item.data_ptr() not in parameters]
    y.sum().backward()
    found = [y.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    return found, sum(item.nbytes for item in kept), {site.decision for site in dct_compile.report().sites}


@pytest.mark.parametrize("codec", ["int8", "threshold"])
def test_gradients_are_those_without_a_checkpoint(ranks2: Ranks, codec: str) -> None:
    """Stochastic rounding is drawn from the data's own bits, so it comes out alike."""
    for (found, kept, decisions), (expected, more, _) in zip(ranks2(gradients, codec, True), ranks2(gradients, codec, False), strict=True):
        assert len(found) == 7
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert kept < more
        assert decisions == {"compressed"}
