"""The dense parameters of a bucket travel behind its payload: their mean is that of an all_reduce, on every rank alike."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.plan import decide
from dct_compile.schemes import GradientOffer
from dct_compile.state.bucket import BucketState
from tests.rank_pool import Ranks

pytestmark = pytest.mark.distributed

SIZES = (3, 4096, 1, 100)
"""Elements of the parameters of the bucket; only the second one is compressed."""
DENSE = [(0, 3), (4099, 4200)]


class Counting(Comm):
    """Counts the collectives that are started."""

    started: list[str] = []  # noqa: RUF012  (the class of one call)

    def all_gather(self, x: Tensor) -> Tensor:
        self.started.append("all_gather")
        return super().all_gather(x)

    def all_to_all(self, x: Tensor) -> Tensor:
        self.started.append("all_to_all")
        return super().all_to_all(x)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        self.started.append("all_reduce")
        return super().all_reduce(x, op)


def averaged(rank: int, world_size: int, scheme: str, dtype: torch.dtype, special: float = 0.0, sizes: tuple[int, ...] = SIZES) -> Any:
    """Returns the reduced bucket, the mean of all_reduce, and the collectives that were started. ``special``: a value of rank 1."""
    group = dist.group.WORLD
    assert group is not None
    members = [Parameter(index, f"p{index}", (numel,)) for index, numel in enumerate(sizes)]
    exchange = gradient_exchange(ALL_REDUCE, segments_of(members), dtype, group)
    offer = decide(exchange, DCTConfig(gradient_scheme=scheme, dp_density=0.05)).offer
    assert isinstance(offer, GradientOffer)
    grad = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(rank)).to(dtype)
    if special and rank == 1:
        grad[1] = special
    mean = grad.clone()
    dist.all_reduce(mean)
    comm = Counting(group.group_name, world_size)
    comm.started.clear()
    reduced = offer.reduce(grad, BucketState([], offer.state, grad.device).tensors, comm)
    return reduced, mean / world_size, list(comm.started)


MESSAGES = {"gather": ["all_gather"], "owner": ["all_to_all", "all_gather"]}


def dense_of(buffer: Tensor) -> Tensor:
    return torch.cat([buffer[start:end] for start, end in DENSE])


def check(results: list[Any], scheme: str, compare: Any) -> None:
    first = results[0][0]
    for reduced, mean, started in results:
        compare(dense_of(reduced), dense_of(mean))
        assert torch.equal(reduced, first), "the ranks differ"
        assert started == MESSAGES[scheme]
    assert int((first[3:4099] != 0).sum()) > 0


def exactly(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_two_ranks_get_the_mean_bit_for_bit(ranks2: Ranks, scheme: str) -> None:
    check(ranks2(averaged, scheme, torch.float32), scheme, exactly)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_sixteen_bits_are_rounded_once(ranks2: Ranks, scheme: str, dtype: torch.dtype) -> None:
    check(ranks2(averaged, scheme, dtype), scheme, partial(torch.testing.assert_close, rtol=0.01, atol=0.01))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_three_ranks_get_the_mean(ranks3: Ranks, scheme: str, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    check(ranks3(averaged, scheme, dtype), scheme, partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance))


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_a_value_that_is_not_finite_reaches_all_ranks(ranks3: Ranks, scheme: str, special: float) -> None:
    for reduced, _, _ in ranks3(averaged, scheme, torch.float32, special):
        assert not torch.isfinite(reduced[1])
        assert torch.isfinite(dense_of(reduced)).sum() == 103


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_a_large_rest_has_an_all_reduce_of_its_own(ranks2: Ranks, scheme: str) -> None:
    for reduced, mean, started in ranks2(averaged, scheme, torch.float32, 0.0, (100, 20000, *[99] * 50)):
        assert started == ["all_reduce", *MESSAGES[scheme]]
        assert torch.equal(reduced[:100], mean[:100])
        assert torch.equal(reduced[20100:], mean[20100:])
