"""Ranks compare what they are about to exchange: a difference is an error on all of them, and nobody waits for what need not come."""

import gc
from collections.abc import Callable, Sequence

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from dct_compile.agreement import Agreement
from tests import agreement_scenarios as scenarios
from tests.agreement_scenarios import DENSE, GATHER, GATHER_MORE, LONG_S, SHORT_S, Outcome, Scene
from tests.rank_pool import GROUP_TIMEOUT, Ranks

Scenario = Callable[[Scene], None]
PAIRS: list[Scenario] = [
    *(
        scenarios.equal,
        scenarios.one_rank_again,
        scenarios.alone_without_sites,
        scenarios.later_check,
        scenarios.other_option,
        scenarios.other_site,
        scenarios.first_site,
        scenarios.missing_site,
        scenarios.other_order,
    ),
    *(
        scenarios.again_after_an_error,
        scenarios.late,
        scenarios.fresh_twice,
        scenarios.second_model,
        scenarios.cut_elsewhere,
        scenarios.backward_cut_elsewhere,
        scenarios.nothing_to_explain,
        scenarios.second_life,
    ),
]
"""On ranks 0 and 1."""
OTHERS: dict[Scenario, tuple[Sequence[int], float]] = {
    scenarios.third_rank_differs: ((0, 1, 2), LONG_S),
    scenarios.traffic: ((0, 1, 2), LONG_S),
    scenarios.subgroup: ((1, 2), LONG_S),
    scenarios.two_threads: ((0, 1), LONG_S),
    scenarios.third_rank_absent: ((0, 1, 2), SHORT_S),
    scenarios.first_rank_absent: ((0, 1, 2), SHORT_S),
    scenarios.too_late: ((0, 1), SHORT_S),
    scenarios.first_rank_too_late: ((0, 1), SHORT_S),
    scenarios.cut_elsewhere_and_different: ((0, 1), SHORT_S),
}
"""With the ranks that take part, and the group's timeout in seconds."""


def play(rank: int, world_size: int) -> dict[str, Outcome]:
    outcomes = {}
    for scenario, (members, timeout_s) in {**dict.fromkeys(PAIRS, ((0, 1), LONG_S)), **OTHERS}.items():
        scene = Scene(members, timeout_s)
        dist.barrier()
        if rank in members or scenario is scenarios.two_threads:
            scenario(scene)
        dist.barrier()
        outcomes[scenario.__name__] = scene.outcome
    outcomes["second_world"] = second_world(rank, world_size)
    return outcomes


def second_world(rank: int, world_size: int) -> Outcome:
    """Three worlds of one name, one after the other, and how many groups are remembered. The last is left for the end of the run."""
    base = _get_default_store()
    agreement, outcome = Agreement(), []
    for world, decisions in enumerate(((GATHER, GATHER, GATHER), (GATHER_MORE, GATHER_MORE, GATHER_MORE), (GATHER, GATHER, DENSE))):
        dist.destroy_process_group()
        gc.collect()
        # Gloo itself needs keys of its own for each world.
        store = PrefixStore(f"world {world}", base)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
        try:
            agreement.check(dist.group.WORLD, {}, [decisions[rank]], fresh=False)
            error = ""
        except RuntimeError as raised:
            error = str(raised)
        outcome.append((error, float(len(agreement._records))))
    return outcome


@pytest.fixture(scope="module")
def outcomes(ranks3: Ranks) -> list[dict[str, Outcome]]:
    return ranks3(play)


def errors(outcomes: list[dict[str, Outcome]], scenario: Callable[..., object], *ranks: int) -> list[list[str]]:
    """For each of ``ranks`` the errors of its checks, in order."""
    return [[error for error, _ in outcomes[rank][scenario.__name__]] for rank in ranks]


AGREED: list[Callable[..., object]] = [
    scenarios.equal,
    scenarios.one_rank_again,
    scenarios.alone_without_sites,
    scenarios.late,
    scenarios.fresh_twice,
    scenarios.cut_elsewhere,
    scenarios.backward_cut_elsewhere,
]


@pytest.mark.distributed
@pytest.mark.parametrize("scenario", [*AGREED, scenarios.nothing_to_explain, scenarios.two_threads], ids=lambda scenario: scenario.__name__)
def test_what_is_equal_is_silent(outcomes: list[dict[str, Outcome]], scenario: Scenario) -> None:
    for rank_errors in errors(outcomes, scenario, 0, 1):
        assert not any(rank_errors), rank_errors


@pytest.mark.distributed
@pytest.mark.parametrize("scenario", [scenarios.one_rank_again, scenarios.alone_without_sites], ids=lambda scenario: scenario.__name__)
def test_what_is_known_waits_for_nobody(outcomes: list[dict[str, Outcome]], scenario: Scenario) -> None:
    assert outcomes[0][scenario.__name__][-1][1] < 0.5


@pytest.mark.distributed
@pytest.mark.parametrize(
    "scenario", [scenarios.later_check, scenarios.second_model, scenarios.second_life], ids=lambda scenario: scenario.__name__
)
def test_an_earlier_check_does_not_silence_a_later_one(outcomes: list[dict[str, Outcome]], scenario: Scenario) -> None:
    for rank_errors in errors(outcomes, scenario, 0, 1):
        assert not any(rank_errors[:-1])
        assert "would compress differently" in rank_errors[-1]


@pytest.mark.distributed
def test_every_rank_names_the_option_and_the_site(outcomes: list[dict[str, Outcome]]) -> None:
    site = "site 1, 'top.weight +3' (all_reduce gradient float32 [4096]), is "
    for rank, (error,) in enumerate(errors(outcomes, scenarios.other_option, 0, 1)):
        here, there = ("0.01", "0.05")[rank], ("0.05", "0.01")[rank]
        assert f"ranks {rank} and {1 - rank} of group" in error
        assert f"{site}'gather density={here}' on rank {rank} and 'gather density={there}' on rank {1 - rank}" in error
        assert f"option 'dp_density' is {here} on rank {rank} and {there} on rank {1 - rank}" in error
        assert "min_numel" not in error


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("scenario", "position", "texts"),
    [
        (scenarios.other_site, 1, ("float32 [64]", "float32 [80]")),
        (scenarios.first_site, 0, ("float32 [64]", "float32 [80]")),
        (scenarios.missing_site, 1, ("float32 [64]", "missing on rank 1")),
        (scenarios.other_order, 0, ("mask slots=4", "dense")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_rank_names_a_site_that_only_one_has(
    outcomes: list[dict[str, Outcome]], scenario: Scenario, position: int, texts: tuple[str, str]
) -> None:
    for rank in (0, 1):
        ((error, seconds),) = outcomes[rank][scenario.__name__]
        assert f"site {position}" in error
        assert all(text in error for text in texts), error
        assert seconds < LONG_S / 2


@pytest.mark.distributed
def test_a_group_starts_anew_after_an_error(outcomes: list[dict[str, Outcome]]) -> None:
    for found in errors(outcomes, scenarios.again_after_an_error, 0, 1):
        assert [bool(error) for error in found] == [True, False, True, False]


@pytest.mark.distributed
def test_ranks_that_agree_hear_of_the_one_that_does_not(outcomes: list[dict[str, Outcome]]) -> None:
    for rank, (error,) in enumerate(errors(outcomes, scenarios.third_rank_differs, 0, 1, 2)):
        assert ("ranks 2 and 0" if rank == 2 else "ranks 0 and 2") in error


@pytest.mark.distributed
def test_ranks_of_a_subgroup_are_named_by_both_numbers(outcomes: list[dict[str, Outcome]]) -> None:
    (first,), (second,) = errors(outcomes, scenarios.subgroup, 1, 2)
    assert "ranks 0 (global rank 1) and 1 (global rank 2) of group" in first
    assert "ranks 1 (global rank 2) and 0 (global rank 1) of group" in second


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("scenario", "present", "absent"),
    [
        (scenarios.third_rank_absent, (0, 1), 2),
        (scenarios.first_rank_absent, (1, 2), 0),
        (scenarios.too_late, (0, 1), 1),
        (scenarios.first_rank_too_late, (0, 1), 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_does_not_come_is_named_after_the_timeout(
    outcomes: list[dict[str, Outcome]], scenario: Scenario, present: tuple[int, ...], absent: int
) -> None:
    """A rank that comes later raises as well: the others no longer take part."""
    for rank in present:
        ((error, seconds),) = outcomes[rank][scenario.__name__]
        assert f"waited 2 s for rank {absent}, which did not come" in error
        assert "site 0, " in error
        assert rank == absent or SHORT_S <= seconds < LONG_S / 2


@pytest.mark.distributed
def test_an_error_of_a_collective_is_explained(outcomes: list[dict[str, Outcome]]) -> None:
    (_, found), (_, note) = errors(outcomes, scenarios.cut_elsewhere_and_different, 0, 1)
    assert "option 'dp_density' is 0.01 on rank 0 and 0.05 on rank 1" in found
    assert note == found


@pytest.mark.distributed
def test_messages_grow_with_the_ranks_not_with_the_sites(outcomes: list[dict[str, Outcome]]) -> None:
    """A check leaves a key for each rank, and the verdict."""
    assert outcomes[0]["traffic"][-1][0] == "4"


@pytest.mark.distributed
def test_a_new_world_of_the_same_name_starts_anew(outcomes: list[dict[str, Outcome]]) -> None:
    for rank in range(3):
        first, second, third = outcomes[rank]["second_world"]
        assert (first, second) == (("", 1.0), ("", 1.0))
        assert "ranks 0 and 2" in third[0] or "ranks 2 and 0" in third[0]


def test_one_rank_and_the_fake_backend_are_not_compared() -> None:
    for backend, world_size in (("gloo", 1), ("fake", 2)):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=world_size)
        try:
            Agreement().check(dist.group.WORLD, {}, [GATHER], fresh=True)
        finally:
            dist.destroy_process_group()
