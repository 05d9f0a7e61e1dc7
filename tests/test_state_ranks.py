"""States of several ranks: files of all of them are one state, and another number of ranks takes it over without a loss."""

import copy
import io
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dct_compile
from dct_compile.state.bucket import BucketState
from dct_compile.state.entry import Entry, fold_share
from dct_compile.state.ranks import StateDict, sources, state_for
from tests.states import assert_same, fill, make_model, state_spec

NUMELS = [1000, 300]


def saved_by(ranks: int, owner: bool) -> list[StateDict]:
    """The state of each rank. The values are whole numbers, so that sums are exact."""
    states = []
    for rank in range(ranks):
        bucket = fill(BucketState([], state_spec(NUMELS, ranks if owner else 0, rank), torch.device("cpu")), rank)
        for name, tensor in bucket.tensors.items():
            if name.endswith("residual"):
                tensor.mul_(100).round_()
        states.append(StateDict({f"p{index}": bucket.saved(index) for index in range(2)}, rank, ranks))
    return states


def waiting(states: Sequence[Mapping[str, Entry]], name: str) -> Tensor:
    """The mean over the ranks of what waits for the parameter, owned shares included."""
    return torch.stack([fold_share(state[name])["residual"].double() for state in states]).mean(0)


def written(state: StateDict) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("ranks", "saved", "expected"),
    [(2, 4, [[0, 2], [1, 3]]), (2, 3, [[0, 2], [1]]), (3, 2, [[0], [1], [0]]), (1, 3, [[0, 1, 2]]), (4, 1, [[0]] * 4)],
)
def test_every_saved_rank_has_one_successor(ranks: int, saved: int, expected: list[list[int]]) -> None:
    assert [sources(rank, ranks, saved) for rank in range(ranks)] == expected


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 3), (3, 2), (3, 1), (3, 4), (2, 5), (2, 2)])
@pytest.mark.parametrize("owner", [False, True], ids=["gather", "owner"])
def test_the_mean_over_the_ranks_stays_the_same(saved: int, loaded: int, owner: bool) -> None:
    files = [written(state) for state in saved_by(saved, owner)]
    found = [state_for(files[::-1], rank, loaded) for rank in range(loaded)]
    for name in ("p0", "p1"):
        torch.testing.assert_close(waiting(found, name), waiting(files, name), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("owner", [False, True], ids=["gather", "owner"])
def test_the_same_number_of_ranks_takes_each_state_as_it_is(owner: bool) -> None:
    files = [written(state) for state in saved_by(2, owner)]
    for rank in range(2):
        assert_same(dict(state_for(files, rank, 2)), dict(files[rank]))
        assert_same(dict(state_for(files[rank], rank, 2)), dict(files[rank]))


def test_all_but_the_residual_comes_from_the_first_rank() -> None:
    states = saved_by(4, owner=False)
    found = state_for(states, 1, 2)["p1"]
    assert torch.equal(found["threshold"], states[1]["p1"]["threshold"])
    assert torch.equal(found["counters"], states[1]["p1"]["counters"])


def test_ranks_that_share_a_predecessor_divide_what_waits() -> None:
    """Thresholds of before fit it, and each element has the same place in the order of magnitudes."""
    states = saved_by(2, owner=True)
    for rank, factor in enumerate((1.5 / 2, 1.5, 1.5 / 2)):
        found, saved = state_for(states, rank, 3)["p0"], states[rank % 2]["p0"]
        assert found.keys() == {"residual", "threshold", "counters"}
        assert torch.equal(found["residual"], fold_share(saved)["residual"] * factor)
        assert torch.equal(found["threshold"], saved["threshold"])


def test_a_state_that_only_another_rank_has_is_taken_over() -> None:
    """A rank may have compressed a parameter that another one has not used yet."""
    states = saved_by(2, owner=False)
    del states[0]["p1"]
    assert torch.equal(state_for(states, 0, 1)["p1"]["residual"], states[1]["p1"]["residual"] / 2)


def test_files_that_do_not_name_their_rank_stand_in_order() -> None:
    states = saved_by(3, owner=False)
    found = state_for([dict(state) for state in states], 0, 2)
    torch.testing.assert_close(found["p0"]["residual"], (states[0]["p0"]["residual"] + states[2]["p0"]["residual"]) * 2 / 3)


def test_a_written_state_is_an_ordered_dict_that_names_its_rank() -> None:
    state = saved_by(3, owner=True)[2]
    found = written(state)
    assert type(found) is OrderedDict
    assert (found.rank, found.ranks) == (2, 3)
    assert_same(found, state)


def test_a_copied_state_is_still_one() -> None:
    state = saved_by(3, owner=True)[2]
    found = copy.deepcopy(state)
    assert (type(found), found.rank, found.ranks) == (StateDict, 2, 3)
    assert found["p0"]["residual"] is not state["p0"]["residual"]
    assert_same(found, state)


STATES = saved_by(4, owner=False)
REFUSED = {
    "one of another number of ranks": (
        STATES[0],
        "rank 0 of 2 takes over the states of ranks 0 and 2 of 4; not given: rank 2. Give",
    ),
    "one of another rank": (saved_by(2, owner=False)[1], "rank 0 of 2 takes over the states of rank 0 of 2; not given: rank 0"),
    "one missing": (STATES[:2] + STATES[3:], "rank 0 of 2 takes over the states of ranks 0 and 2 of 4; not given: rank 2"),
    "one twice": ([STATES[1], *STATES], "the state of rank 1 of 4 is given twice"),
    "two runs": ([*STATES, *saved_by(2, owner=False)], "the states must be of one run, not of runs with 2 and 4 ranks"),
    "none": ([], "a state is a dict by parameter name, or a list of such dicts, not []"),
    "a tensor": (torch.zeros(2), "a state is a dict by parameter name, or a list of such dicts, not tensor([0., 0.])"),
    "a list of tensors": ([torch.zeros(2)], "a state is a dict by parameter name, or a list of such dicts, not [tensor([0., 0.])]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_states_that_would_lose_something_are_refused(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        state_for(given, 0, 2)


def test_damaged_states_are_refused_before_they_are_added_up() -> None:
    states = saved_by(2, owner=False)
    states[1]["p1"]["residual"][7] = float("nan")
    with pytest.raises(ValueError, match="the state of p1: residual has values that are NaN or infinite"):
        state_for(states, 0, 1)


def test_the_files_of_all_ranks_are_loaded_by_one_call() -> None:
    states, model = saved_by(3, owner=True), make_model(*NUMELS)
    dct_compile.load_state_dict(model, states)
    found = dct_compile.state_dict(model)
    assert (found.rank, found.ranks) == (0, 1)
    for name in ("p0", "p1"):
        torch.testing.assert_close(found[name]["residual"].double(), waiting(states, name), rtol=1e-6, atol=1e-4)
