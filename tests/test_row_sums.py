"""Sums of encoded rows over ranks: values and gradients as by the reference."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dct_compile.embeddings.codec import RowCodec
from dct_compile.embeddings.sums import RowCodecs, RowSum
from tests.ranks_embeddings import coded, normal

pytestmark = pytest.mark.distributed


def summed(rank: int, ranks: int, splits: list[int], bits: int, dtype: torch.dtype, divided: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns pairs that must be equal: the sum of this rank, and the gradient of its addends; each with the reference."""
    partials = [normal(10 + other, sum(splits), 32).to(dtype) for other in range(ranks)]
    grads = [normal(other, split, 32).to(dtype) for other, split in enumerate(splits)]
    codecs = RowCodecs(RowCodec(16, bits, "test"), RowCodec(16, bits, "test", number=1))
    partial = partials[rank].requires_grad_()
    assert dist.group.WORLD is not None
    found = RowSum(partial, splits, dist.group.WORLD, codecs, divided).wait()
    found.backward(grads[rank])
    expected = partials[rank].detach().split(splits)[rank].float()
    for other in sorted(set(range(ranks)) - {rank}):
        parts = list(partials[other].detach().split(splits))
        parts.pop(other)
        sent = coded(torch.cat(parts).float(), 16, bits) if dtype == torch.float32 else coded(torch.cat(parts), 16, bits).float()
        sizes = [split for place, split in enumerate(splits) if place != other]
        expected = expected + sent.split(sizes)[rank - (other < rank)]
    back = torch.cat([grad if other == rank else coded(grad, 16, bits, number=1) for other, grad in enumerate(grads)])
    assert partial.grad is not None
    return [(found.detach(), expected.to(dtype)), (partial.grad, back / ranks if divided else back)]


@pytest.mark.parametrize(
    ("ranks", "splits", "bits", "dtype", "divided"),
    [
        ("ranks2", [5, 5], 8, torch.float32, True),
        ("ranks2", [5, 5], 4, torch.float32, False),
        ("ranks3", [4, 0, 7], 8, torch.float32, True),
        ("ranks3", [4, 6, 7], 8, torch.float16, True),
        ("ranks2", [0, 0], 8, torch.float32, True),
    ],
)
def test_sums_and_their_gradients_are_those_of_the_reference(
    ranks: str, splits: list[int], bits: int, dtype: torch.dtype, divided: bool, request: pytest.FixtureRequest
) -> None:
    """Ranks of different batches, or of none, too."""
    exact = {torch.float32: 1e-6, torch.float16: 2e-2}[dtype]
    for pairs in request.getfixturevalue(ranks)(summed, splits, bits, dtype, divided):
        for actual, expected in pairs:
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=exact)
