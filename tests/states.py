"""Small states of parameters, for tests of how they are kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dct_compile.schemes import GradientOffer
from dct_compile.state.bucket import BucketState
from dct_compile.state.spec import StateSpec
from tests.hand_made_sites import decide, make_gradient


def state_spec(numels: Sequence[int], ranks: int = 0, rank: int = 0, density: float = 0.01) -> StateSpec:
    """The state that "gather" keeps of a bucket of parameters of these sizes, or that "owner" keeps on ``rank`` of ``ranks``.

    Blocks are of 256 elements, and of 4096 below a density of 0.0034.
    """
    scheme = "owner" if ranks else "gather"
    site = make_gradient(*numels, ranks=ranks or 2, rank=rank)
    made = [decide(site, gradient_scheme=scheme, dp_density=density, min_numel=0).offer]
    assert isinstance(made[0], GradientOffer)
    return made[0].state


def make_model(*numels: int) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(numel)) for i, numel in enumerate(numels)})


def fill(bucket: BucketState, seed: int = 0) -> BucketState:
    """Random state, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in bucket.tensors.values():
        whole = tensor.dtype == torch.int64
        tensor.copy_(torch.randint(1, 100, tensor.shape, generator=generator) if whole else torch.randn(tensor.shape, generator=generator))
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
