"""Option ``parameter_densities``: parameters of one bucket with densities of their own."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dct_compile.config import DCTConfig
from dct_compile.runtime import Runtime
from dct_compile.schemes import GradientOffer
from dct_compile.schemes.threshold import Gather
from dct_compile.schemes.threshold_owner import Owner
from dct_compile.triton_kernels.layout import SMALL_BLOCK, WHOLE_PIECE, GradientLayout, Selection
from tests.gradient_cases import ALL, COMPILED, REFERENCE, Bucket, Implementation, assert_same_state
from tests.hand_made_sites import decide, make_gradient

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DENSITIES: Any = (0.1, 0.3, 0.02)
CAPACITIES: Any = (0.11, 0.33, 0.022)


@pytest.mark.parametrize("implementation", ALL)
def test_each_parameter_has_a_threshold_and_a_capacity_of_its_own(implementation: Implementation) -> None:
    bucket = Bucket(((0, 700), (700, 900), (1600, 1000)), 2600, capacity=CAPACITIES)
    grad = torch.randn(2600, generator=torch.Generator().manual_seed(1))
    bucket.select(implementation, grad, DENSITIES)
    ranked = [part.abs().sort(descending=True).values for part in grad.split([700, 900, 1000])]
    assert bucket.state[1].tolist() == [ranked[0][69].item(), ranked[1][269].item(), ranked[2][19].item()]
    assert [piece.capacity for piece in bucket.layout.pieces] == [77, 297, 22]
    bucket.pack(implementation, grad)
    assert bucket.state[2][:, 4].tolist() == [70, 270, 20]
    bucket.select(implementation, grad, DENSITIES, "laplace")
    means = [part.abs().double().mean().item() for part in (grad + bucket.state[0]).split([700, 900, 1000])]
    expected = [-mean * math.log(density) for mean, density in zip(means, DENSITIES, strict=True)]
    assert bucket.state[1].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("implementation", COMPILED)
def test_implementations_agree(implementation: Implementation) -> None:
    """Steps of a rank and of an owner; thresholds of steps that are not due follow the targets of their parameters."""
    for chunks, chunk in ((2, -1), (2, 1)):
        bucket = Bucket(((0, 700), (700, 900), (1600, 1000)), 2600, 256, chunks, chunk, CAPACITIES, torch.bfloat16)
        bucket.numel = bucket.layout.state_numel if chunk >= 0 else 2600
        for step in range(3):
            grad = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(step))
            twin = bucket.copy()
            options = {"refresh_interval": 2, "hold": True}
            if chunk < 0:
                for one, by in ((bucket, implementation), (twin, REFERENCE)):
                    one.select(by, grad, DENSITIES, **options)
                assert torch.equal(bucket.pack(implementation, grad), twin.pack(REFERENCE, grad))
            else:
                gathered = bucket.copy().pack(REFERENCE, grad).repeat(2)
                found = bucket.repack(implementation, gathered, DENSITIES, **options)
                assert torch.equal(found, twin.repack(REFERENCE, gathered, DENSITIES, **options))
            assert_same_state(bucket, twin)


def test_numbers_that_are_not_one_for_each_segment_are_refused() -> None:
    with pytest.raises(ValueError, match="capacity_fraction has 2 numbers: expected one, or one for each of 1 segments"):
        GradientLayout(((0, 9),), 256, 1, -1, (0.1, 0.2), torch.float32)
    with pytest.raises(ValueError, match=r"capacity_fraction\[1\] is 1.5: expected a number from 0 to 1"):
        GradientLayout(((0, 9), (9, 9)), 256, 1, -1, (0.1, 1.5), torch.float32)
    with pytest.raises(ValueError, match=r"density 0 is outside \(0, 1\]"):
        Selection((0.1, 0), "exact", 0.0, 1, "off")
    layout = GradientLayout(((0, 9),), 256, 1, -1, 1.0, torch.float32)
    state = torch.zeros(9), torch.ones(1), torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="density has 2 numbers: expected one, or one for each of 1 segments"):
        torch.ops.dct.select_threshold(torch.ones(9), *state, layout, Selection((0.1, 0.2), "exact", 0.0, 1, "off"), True)


OPTIONS: dict[str, Any] = {"dp_density": 0.01, "parameter_densities": {"p1": 0.05, "p2": 1, "p*": 0.02}}


def offered(**options: Any) -> GradientOffer:
    offer = decide(make_gradient(4000, 6000, 500, 2000), **{**OPTIONS, **options}).offer
    assert isinstance(offer, GradientOffer)
    return offer


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_a_bucket_of_several_densities(scheme: str) -> None:
    """The first pattern that matches counts; 1 leaves a parameter dense."""
    offer = offered(gradient_scheme=scheme)
    assert isinstance(offer, Gather | Owner)
    assert offer.reason == f"{scheme}, density 0.02 to 0.05; dense: p2"
    assert offer.codec.selection.density == (0.02, 0.05, 0.02)
    assert offer.codec.layout.capacity_fraction == pytest.approx((0.022, 0.055, 0.022))
    assert "exact for density 0.02, 0.05, 0.02" in offer.digest
    assert offer.state.densities == (0.02, 0.05, 0.02)


def test_random_k_draws_as_many_of_each_as_its_density_says() -> None:
    assert offered(gradient_scheme="random_k").state.sent == (80, 300, 40)


def test_equal_densities_are_one_number() -> None:
    """It is printed into generated code."""
    plain = decide(make_gradient(4000, 6000), dp_density=0.02, gradient_scheme="gather").offer
    same = decide(make_gradient(4000, 6000), parameter_densities={"*": 0.02}, gradient_scheme="gather").offer
    assert isinstance(plain, Gather)
    assert isinstance(same, Gather)
    assert (plain.codec, plain.digest) == (same.codec, same.digest)
    assert same.codec.selection.density == 0.02


def test_the_block_is_the_best_for_all_parameters() -> None:
    """Few elements of a high density do not make the indices of the others larger, and the other way round."""
    blocks = []
    for numels in ((100_000, 1000), (1000, 100_000)):
        site = make_gradient(*numels)
        offer = decide(site, dp_density=0.0001, parameter_densities={"p1": 0.2}, gradient_scheme="gather").offer
        assert isinstance(offer, Gather)
        blocks.append(offer.codec.layout.block)
    assert blocks == [4096, SMALL_BLOCK]
    alone = decide(make_gradient(100_000), dp_density=0.0001, gradient_scheme="gather").offer
    assert isinstance(alone, Gather)
    assert alone.codec.layout.block == WHOLE_PIECE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"parameter_densities": {"p0": 1}}, "parameter_densities keeps everything of it"),
        ({"dp_density": 1}, "dp_density=1 keeps everything"),
        ({"dp_density": 1, "parameter_densities": {"q": 0.1}}, "dp_density=1 keeps everything"),
    ],
)
def test_a_parameter_that_stays_dense(options: dict[str, Any], reason: str) -> None:
    decision = decide(make_gradient(4000), **options)
    assert (decision.offer, decision.reason) == (None, reason)


def test_a_parameter_may_be_compressed_where_others_are_dense() -> None:
    offer = decide(make_gradient(4000, 6000), dp_density=1, parameter_densities={"p1": 0.05}, gradient_scheme="gather").offer
    assert offer is not None
    assert offer.reason == "gather, density 0.05; dense: p0"


def test_optimizers_are_told_the_density_of_each_parameter() -> None:
    runtime = Runtime()
    config = DCTConfig(**OPTIONS, gradient_scheme="gather")
    parameters = [torch.nn.Parameter(torch.zeros(numel)) for numel in (4000, 6000, 2000)]
    bucket = runtime.states.bucket(parameters, offered(gradient_scheme="gather").state)
    runtime.begin_exchange(bucket, config)
    assert [use.gap for use in bucket.pending.uses] == [50, 20, 50]
    again = offered(gradient_scheme="gather", parameter_densities={"p0": 0.5, "p2": 1}).state
    assert runtime.states.bucket(parameters, again) is bucket  # and its residual is kept
    runtime.begin_exchange(bucket, config)
    assert [use.gap for use in bucket.pending.uses] == [2, 100, 100]
    assert [use.waits for use in bucket.pending.uses] == [False, True, True]


def test_options_are_comparable_and_can_be_made_again() -> None:
    config = DCTConfig(parameter_densities={"b": 0.5, "a*": 1})  # type: ignore[arg-type]
    assert config.parameter_densities == (("b", 0.5), ("a*", 1.0))
    assert config.comparable()["parameter_densities"] == [["b", 0.5], ["a*", 1.0]]
    assert hash(config) == hash(replace(config))
    assert replace(config, rank=2).parameter_densities == config.parameter_densities
    assert config != DCTConfig(parameter_densities={"a*": 1, "b": 0.5})  # type: ignore[arg-type]
