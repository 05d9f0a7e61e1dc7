"""Small states of parameters, for tests of how they are kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dct_compile.state import BucketState
from dct_compile.triton_kernels.layout import GradientLayout


def make_layout(numels: Sequence[int], chunks: int = 1, chunk: int = -1, block: int = 256) -> GradientLayout:
    """A bucket of parameters of these sizes, end to end."""
    segments = tuple((sum(numels[:i]), numel) for i, numel in enumerate(numels))
    return GradientLayout(segments, block, chunks, chunk, 0.1, torch.bfloat16)


def geometry(numels: Sequence[int], ranks: int = 0, rank: int = 0, block: int = 256) -> tuple[GradientLayout, GradientLayout | None]:
    """Layouts of the "gather" scheme, or of "owner" for that many ranks."""
    if not ranks:
        return make_layout(numels, block=block), None
    return make_layout(numels, ranks, block=block), make_layout(numels, ranks, rank, block)


def make_model(*numels: int) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(numel)) for i, numel in enumerate(numels)})


def fill(bucket: BucketState, seed: int = 0) -> BucketState:
    """Random state, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    for stage in filter(None, (bucket.local, bucket.owner)):
        stage.residual.copy_(torch.randn(stage.residual.shape, generator=generator))
        stage.threshold.copy_(torch.rand(stage.threshold.shape, generator=generator))
        stage.counters.copy_(torch.randint(1, 100, stage.counters.shape, generator=generator))
    return bucket


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
        elif isinstance(value, dict):
            assert_same(value, other[key])
        else:
            assert value == other[key]
