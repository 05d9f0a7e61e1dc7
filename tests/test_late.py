"""Gradients that arrive one step later, on one process: the option, the scheme's function, saved states, and graphs."""

from typing import Any

import pytest
import torch

import dct_compile
from dct_compile.config import DCTConfig
from dct_compile.passes.plan import decide_outside
from dct_compile.reasons import Reason
from dct_compile.schemes.late import Late
from dct_compile.state.bucket import BucketState
from dct_compile.state.ranks import StateDict, state_for
from dct_compile.state.spec import LATE, StateSpec
from dct_compile.state.store import StateStore
from tests.audited_trainings import Net
from tests.hand_made_sites import decide, make_gradient
from tests.states import assert_same, fill, make_model, state_spec

NUMELS = [1000, 300]


def late_spec() -> StateSpec:
    exchange = decide(make_gradient(*NUMELS)).exchange
    offer = decide_outside(exchange, DCTConfig(gradient_scheme="gather", arrival="late")).offer
    assert isinstance(offer, Late)
    return offer.state


def test_a_late_mean_needs_a_residual() -> None:
    with pytest.raises(ValueError, match=r"option 'arrival' is 'late' .*; allowed is one of 'now' with error_feedback=False"):
        DCTConfig(arrival="late", error_feedback=False)


def saved_by(ranks: int) -> list[StateDict]:
    """The states of ranks that share a late mean; whole numbers, so that sums are exact."""
    states = []
    for rank in range(ranks):
        bucket = fill(BucketState([], late_spec(), torch.device("cpu")), rank)
        bucket.tensors["residual"].mul_(100).round_()
        bucket.tensors[LATE].copy_(torch.arange(sum(NUMELS)))
        states.append(StateDict({f"p{index}": bucket.saved(index) for index in range(2)}, rank, ranks))
    return states


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 3), (3, 1), (1, 2)])
def test_another_number_of_ranks_adds_it_to_the_residuals(saved: int, loaded: int) -> None:
    files = saved_by(saved)
    found = [state_for(files, rank, loaded) for rank in range(loaded)]
    for name in ("p0", "p1"):
        assert all(LATE not in state[name] for state in found)
        expected = torch.stack([state[name]["residual"] + state[name][LATE] for state in files]).mean(0)
        torch.testing.assert_close(torch.stack([state[name]["residual"] for state in found]).mean(0), expected, rtol=1e-5, atol=1e-3)


def test_the_same_number_of_ranks_keeps_it() -> None:
    files = saved_by(2)
    assert_same(dict(state_for(files, 1, 2)), dict(files[1]))


def test_a_state_without_it_adds_it_to_the_residual() -> None:
    (saved,) = saved_by(1)
    store, model = StateStore(), make_model(*NUMELS)
    store.load_state_dict(model, saved)
    store.drain(model)  # no bucket holds it yet
    expected = store.state_dict(model)
    store.load_state_dict(model, saved)
    store.bucket(list(model.values()), state_spec(NUMELS))
    assert_same(store.state_dict(model), expected)
    assert torch.equal(expected["p1"]["residual"], saved["p1"]["residual"] + saved["p1"][LATE])


def test_a_state_from_before_starts_with_zeros_and_keeps_its_counters() -> None:
    (saved,) = saved_by(1)
    store, model = StateStore(), make_model(*NUMELS)
    store.load_state_dict(model, {name: {key: value for key, value in entry.items() if key != LATE} for name, entry in saved.items()})
    store.bucket(list(model.values()), late_spec())
    for name, entry in store.state_dict(model).items():
        assert torch.equal(entry["counters"], saved[name]["counters"])
        assert not entry[LATE].any()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(299), r"the state of p1: late must be float32 \[300\], not float32 \[299\]"),
        (torch.zeros(300).half(), r"the state of p1: late must be float32 \[300\], not float16 \[300\]"),
        (None, r"the state of p1: late must be float32 \[300\], not NoneType None"),
    ],
    ids=["short", "half", "none"],
)
def test_a_damaged_one_is_refused(value: Any, message: str) -> None:
    (saved,) = saved_by(1)
    saved["p1"][LATE] = value
    with pytest.raises(ValueError, match=message):
        StateStore().load_state_dict(make_model(*NUMELS), saved)


def test_a_graph_says_that_its_gradients_arrive_now() -> None:
    report = dct_compile.explain(Net(), torch.randn(8, 16), options={"data_parallel": True, "arrival": "late"}, ranks=2)
    reasons = {site.reason for site in report.sites if site.decision == "compressed"}
    assert len(reasons) == 1
    assert all(reason.endswith(Reason.NOW_IN_GRAPH.removeprefix("{reason}")) for reason in reasons)
