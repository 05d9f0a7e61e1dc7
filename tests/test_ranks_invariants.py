"""The invariants of DCT-DP at every step of trainings under DDP, over gloo ranks."""

import itertools

import pytest
import torch

import dct_compile
from tests.rank_pool import Ranks
from tests.ranks_audit import Auditor
from tests.ranks_ddp import Net, Outcome, ddp_of, outcome, train

pytestmark = pytest.mark.distributed

STEPS = 20
VARIANTS = [
    ("gather", "float32", "float32"),
    ("gather", "bfloat16", "float32"),
    ("owner", "bfloat16", "float32"),
    ("owner", "float16", "float32"),
    ("gather", "float16", "float32"),
    ("gather", "bfloat16", "bfloat16"),
]
"""(all_reduce, dp_value_dtype, dtype of the parameters)"""
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids="-".join)


def audited(rank: int, world_size: int, scheme: str, value_dtype: str, dtype: str) -> tuple[Outcome, set[str], list[list[list[int]]]]:
    """Returns the outcome, the parameters that were compressed, and their counters."""
    options = {"dp_density": 0.05, "dp_value_dtype": value_dtype, "gradient_scheme": scheme, "refresh_interval": 4}
    module, compiled = ddp_of(Net().to(getattr(torch, dtype)), options, inside=scheme == "owner")
    auditor = Auditor(module, 0.05, getattr(torch, value_dtype))
    digests = train(module, compiled, rank, range(STEPS), auditor)
    auditor.finish()
    counters = [entry["counters"].tolist() for entry in dct_compile.state_dict(module).values()]
    return outcome(module, digests), auditor.compressed, counters


@every_variant
def test_they_hold_and_the_ranks_parameters_are_equal(ranks2_once: Ranks, variant: tuple[str, ...]) -> None:
    (first, *_), (second, *_) = ranks2_once(audited, *variant)
    assert first.digests == second.digests


@every_variant
def test_every_step_trains(ranks2_once: Ranks, variant: tuple[str, ...]) -> None:
    assert len(set(ranks2_once(audited, *variant)[0][0].digests)) == STEPS


@every_variant
def test_every_weight_is_compressed(ranks2_once: Ranks, variant: tuple[str, ...]) -> None:
    result, compressed, _ = ranks2_once(audited, *variant)[0]
    assert {decision for decision, _ in result.decisions} == {"compressed"}
    assert compressed == {"bottom.weight", "middle.weight", "top.weight", "side.weight"}


@every_variant
def test_every_step_is_counted(ranks2_once: Ranks, variant: tuple[str, ...]) -> None:
    _, _, counters = ranks2_once(audited, *variant)[0]
    assert {steps for steps, *_ in counters} == {STEPS}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(VARIANTS, 2)))
def test_every_variant_rounds_or_selects_differently(ranks2_once: Ranks, one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert ranks2_once(audited, *one)[0][0].digests[-1] != ranks2_once(audited, *other)[0][0].digests[-1]


def unused_at_times(rank: int, world_size: int, scheme: str) -> list[str]:
    module, compiled = ddp_of(Net(), {"dp_density": 0.05, "gradient_scheme": scheme}, inside=True, find_unused_parameters=True)
    auditor = Auditor(module, 0.05, torch.bfloat16)
    digests = train(module, compiled, rank, range(6), auditor, arguments=lambda step: (step % 2 == 0,))
    auditor.finish()
    return digests


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_a_step_in_which_no_rank_uses_a_parameter_loses_none_of_its_residual(ranks2: Ranks, scheme: str) -> None:
    """DDP throws the result of such a step away: what was sent then would be lost, and the audit fails."""
    first, second = ranks2(unused_at_times, scheme)
    assert first == second
