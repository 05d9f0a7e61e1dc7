"""Embedding exchanges over gloo ranks: each codec keeps its error bounds, forward and backward."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import exchanged
from tests.small_models import exchange

pytestmark = pytest.mark.distributed

DIM = 32
ROWS = 64
CODES = {"int8": 127, "int4": 7}


class Lookup(nn.Module):
    """Sends each row of an embedding to another rank and returns it as it arrives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return exchange(self.table(ids))


class Outcome(NamedTuple):
    """``rows``, ``grads`` [ROWS, DIM]: what was received forward and backward, and the same without compression.

    ``sites``: kind, decision, bytes without compression by bytes on the wire.
    """

    rows: tuple[Tensor, Tensor]
    grads: tuple[Tensor, Tensor]
    sites: list[tuple[str, str, float]]


def looked_up(rank: int, world_size: int, codec: str) -> Outcome:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randperm(100, generator=generator)[:ROWS]  # each id once: a row of the weight's gradient is one row of the exchange
    # Rows of very different sizes, one of zeros.
    weights = torch.randn(ROWS, DIM, generator=generator) * torch.logspace(-6, 3, ROWS).unsqueeze(1)
    weights[3] = 0
    model = Lookup()
    with torch.no_grad():
        model.table.weight.mul_(torch.logspace(-5, 2, 100).unsqueeze(1))
    options = {"embedding_codec": codec, "mp_density": 0.25, "mp_value_dtype": "float32", "mp_outputs": True}
    output = torch.compile(model, backend=dct, options=options)(ids)
    (output * weights).sum().backward()
    grad = model.table.weight.grad
    assert grad is not None
    sites = [(site.kind, site.decision, site.dense_bytes / site.wire_bytes) for site in dct_compile.report().sites]
    rows = output.detach(), exchanged(model.table.weight.detach()[ids])
    return Outcome(rows, (grad[ids], exchanged(weights)), sites)


@pytest.mark.parametrize("codec", CODES)
def test_integers_are_compressed_both_ways(ranks2_once: Ranks, codec: str) -> None:
    for result in ranks2_once(looked_up, codec):
        assert [site[:2] for site in result.sites] == [("embedding", "compressed"), ("embedding_gradient", "compressed")]
        assert all(ratio > (3.7 if codec == "int8" else 7) for *_, ratio in result.sites)


def received(results: list[Outcome], way: str, codec: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields of every rank: received and exact values, and of each row the largest magnitude and the step between two codes."""
    for result in results:
        got, exact = getattr(result, way)
        largest = exact.abs().amax(dim=1, keepdim=True)
        yield got, exact, largest, largest / CODES[codec] * (1 + 2.0**-7)  # the scale is rounded up to bfloat16


@pytest.mark.parametrize("way", ["rows", "grads"])
@pytest.mark.parametrize("codec", CODES)
def test_integers_are_off_by_a_step_at_most(ranks2_once: Ranks, codec: str, way: str) -> None:
    for got, exact, largest, step in received(ranks2_once(looked_up, codec), way, codec):
        assert bool(((got - exact).abs() <= step).all())
        assert torch.equal(got[largest.flatten() == 0], exact[largest.flatten() == 0])
        assert not torch.equal(got, exact)


@pytest.mark.parametrize("way", ["rows", "grads"])
@pytest.mark.parametrize("codec", CODES)
def test_integers_are_rounded_without_bias(ranks2_once: Ranks, codec: str, way: str) -> None:
    """Stochastic rounding: the errors, as fractions of a step, are within [-1, 1] with mean 0."""
    for got, exact, largest, step in received(ranks2_once(looked_up, codec), way, codec):
        fractions = ((got - exact) / step.clamp(min=1e-30))[largest.flatten() > 0]
        assert fractions.mean().abs().item() < 5 * 0.6 / fractions.numel() ** 0.5


def test_a_threshold_sends_the_largest_of_each_row(ranks2_once: Ranks) -> None:
    for (rows, exact), _, sites in ranks2_once(looked_up, "threshold"):
        assert {decision for _, decision, _ in sites} == {"compressed"}
        kept = rows != 0
        assert kept.sum(dim=1).max() == DIM // 4
        assert torch.equal(rows[kept], exact[kept])
        assert bool((rows.abs().amax(dim=1) == exact.abs().amax(dim=1)).all())


def test_a_threshold_sends_the_gradient_behind_its_mask(ranks2_once: Ranks) -> None:
    for _, (grad, exact), _ in ranks2_once(looked_up, "threshold"):
        sent = grad != 0
        assert torch.equal(grad[sent], exact[sent])
        assert sent.sum(dim=1).max() == DIM // 4


def test_dense_embeddings_arrive_as_they_are(ranks2: Ranks) -> None:
    for (rows, exact), (grad, exact_grad), sites in ranks2(looked_up, "dense"):
        assert {decision for _, decision, _ in sites} == {"dense"}
        assert torch.equal(rows, exact)
        assert torch.equal(grad, exact_grad)
