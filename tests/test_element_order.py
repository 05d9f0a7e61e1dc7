"""The order of a parameter's elements in DDP's buckets, and states in row-major order whatever that is."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from dct_compile.element_order import ElementOrder
from dct_compile.exchange import Parameter, segments_of
from dct_compile.state.bucket import BucketState
from dct_compile.state.entry import fold_share
from tests.hand_made_sites import decide, make_gradient
from tests.states import fill


def shapes() -> list[Tensor]:
    tensors = [torch.empty(2, 1, 4, 3).permute(dims).contiguous().permute(_inverse(dims)) for dims in permutations(range(4))]
    channels_last = torch.empty(4, 3, 5, 5).to(memory_format=torch.channels_last)
    return [*tensors, channels_last, torch.empty(6, 7).t(), torch.empty(5), torch.empty(()), torch.empty(0, 4).t()]


def _inverse(dims: tuple[int, ...]) -> list[int]:
    return [dims.index(dim) for dim in range(len(dims))]


@pytest.mark.parametrize("parameter", shapes(), ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}")
def test_elements_lie_as_in_a_bucket_of_ddp(parameter: Tensor) -> None:
    """The reducer views a bucket through the strides of the parameter."""
    order = ElementOrder.of(parameter)
    flat = torch.arange(parameter.numel())
    row_major = flat.as_strided(parameter.shape, parameter.stride()).reshape(-1)
    assert torch.equal(flat if order is None else order.to_row_major(flat), row_major)
    assert torch.equal(row_major if order is None else order.to_buffer(row_major), flat)


@pytest.mark.parametrize("parameter", [torch.empty(4, 6)[:, ::2], torch.empty(3, 1).expand(3, 4), torch.empty(6, 8)[:, ::2].t()])
def test_gaps_and_overlaps_make_a_row_major_gradient(parameter: Tensor) -> None:
    assert ElementOrder.of(parameter) is None


CHANNELS_LAST = ElementOrder((8, 5, 3, 3), (0, 2, 3, 1))


def bucket_of(scheme: str, order: ElementOrder | None, rank: int, ranks: int = 2) -> BucketState:
    segments = segments_of([Parameter(0, "p0", (300,)), Parameter(1, "p1", (8, 5, 3, 3), order)])
    site = make_gradient(300, 360, ranks=ranks, rank=rank, segments=segments)
    offer = decide(site, gradient_scheme=scheme, min_numel=0).offer
    return BucketState([], offer.state, torch.device("cpu"))  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_a_saved_residual_is_row_major(scheme: str) -> None:
    bucket = fill(bucket_of(scheme, CHANNELS_LAST, 0))
    held = bucket.entry(1)["residual"].view(8, 3, 3, 5).permute(0, 3, 1, 2).reshape(-1)
    assert torch.equal(bucket.saved(1)["residual"], held)
    assert torch.equal(bucket.saved(0)["residual"], bucket.entry(0)["residual"])


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_the_same_order_takes_a_state_back_as_it_was(scheme: str) -> None:
    source, target = fill(bucket_of(scheme, CHANNELS_LAST, 1)), bucket_of(scheme, CHANNELS_LAST, 1)
    for index in range(2):
        target.write(index, source.saved(index))
    assert all(torch.equal(tensor, source.tensors[name]) for name, tensor in target.tensors.items())


@pytest.mark.parametrize(("old", "new"), [(CHANNELS_LAST, None), (None, CHANNELS_LAST)], ids=["to row-major", "from row-major"])
@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_another_order_takes_over_all_that_waits(old: ElementOrder | None, new: ElementOrder | None, scheme: str) -> None:
    """Over the ranks, every element waits with the same sum as before: the owned shares are other elements in another order."""
    sources = [fill(bucket_of(scheme, old, rank), rank) for rank in range(2)]
    expected = torch.zeros(360)
    for source in sources:
        parts = source.entry(1)
        laid_out = parts["residual"].clone()
        if "owner" in parts:
            first = 256 * source.spec.owner_share[2]  # type: ignore[index]
            laid_out[first : first + parts["owner"]["residual"].numel()] += parts["owner"]["residual"]
        expected += laid_out if old is None else laid_out.view(8, 3, 3, 5).permute(0, 3, 1, 2).reshape(-1)
    found = torch.zeros(360)
    for rank, source in enumerate(sources):
        target = bucket_of(scheme, new, rank)
        target.write(1, source.saved(1))
        found += fold_share(target.saved(1))["residual"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
