"""What a scheme writes into the buffer that it is given is what it would return as a new tensor."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dct_compile.config import DCTConfig
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.plan import decide_outside
from dct_compile.runtime import RUNTIME
from dct_compile.schemes.observed import Observed
from dct_compile.schemes.offer import GradientOffer
from dct_compile.state.bucket import BucketState
from tests.rank_pool import Ranks

pytestmark = pytest.mark.distributed
PARAMETERS = [Parameter(0, "bias", (40,)), Parameter(1, "weight", (64, 96)), Parameter(2, "head", (33, 50)), Parameter(3, "more", (7,))]
CASES: dict[str, Mapping[str, Any]] = {
    **{scheme: {"gradient_scheme": scheme} for scheme in ("gather", "owner", "two_level", "powersgd", "random_k")},
    "late": {"gradient_scheme": "gather", "arrival": "late"},
    "two levels, late": {"gradient_scheme": "two_level", "arrival": "late"},
}


def both_ways(rank: int, world_size: int, options: Mapping[str, Any], dtype: torch.dtype, observed: bool) -> list[tuple[bool, bool, bool]]:
    """Returns for each of three steps: whether result and state are the same both ways, and whether the result is in the buffer."""
    assert dist.group.WORLD is not None
    config = DCTConfig(**options, dp_density=0.05, min_numel=100)
    exchange = gradient_exchange(ALL_REDUCE, segments_of(PARAMETERS), dtype, dist.group.WORLD, per_host=2)
    offer = decide_outside(exchange, config).offer
    assert isinstance(offer, GradientOffer)
    offer = Observed.of(offer) if observed else offer
    comm = RUNTIME.workers.of(dist.group.WORLD).comm(2)
    new, inside = (BucketState([], offer.state, torch.device("cpu")).tensors for _ in range(2))
    found = []
    for step in range(3):
        grad = torch.randn(sum(parameter.numel for parameter in PARAMETERS), generator=torch.Generator().manual_seed(10 * step + rank)).to(
            dtype
        )
        before = grad.clone()
        with torch.no_grad():
            expected = offer.reduce(grad, new, comm)
            untouched = torch.equal(grad, before)
            result = offer.reduce(before, inside, comm, in_place=True)
        same = torch.equal(result, expected) and all(torch.equal(new[name], inside[name]) for name in new)
        found.append((same, untouched, result.data_ptr() == before.data_ptr()))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_is_the_same(ranks4: Ranks, name: str, dtype: torch.dtype) -> None:
    assert ranks4(both_ways, CASES[name], dtype, False) == [[(True, True, True)] * 3] * 4


def test_an_audit_passes_it_on(ranks4: Ranks) -> None:
    assert ranks4(both_ways, CASES["gather"], torch.float32, True) == [[(True, True, True)] * 3] * 4
