"""A damaged state is refused before anything of it is loaded, and the error names the parameter and what would be right."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dct_compile.schemes import GradientOffer
from dct_compile.state.bucket import BucketState
from dct_compile.state.entry import Entry
from dct_compile.state.store import StateStore
from tests.hand_made_sites import decide, make_gradient
from tests.states import assert_same, fill, make_model, state_spec

NUMELS = [1000, 300]


def drop(name: str) -> Callable[[Entry], object]:
    return lambda entry: entry.pop(name)


def put(name: str, value: Any) -> Callable[[Entry], object]:
    return lambda entry: entry.update({name: value})


def owner(change: Callable[[Entry], object]) -> Callable[[Entry], object]:
    return lambda entry: change(entry["owner"])


def residual(value: float) -> Tensor:
    return torch.full((300,), value)


WHOLE = torch.int64
DAMAGES = {
    "no residual": (drop("residual"), "the state of p1 lacks its residual, float32 [300]"),
    "no threshold": (drop("threshold"), "the state of p1 lacks its threshold, float32 []"),
    "no counters": (drop("counters"), "the state of p1 lacks its counters, int64 [5]"),
    "no owner": (drop("owner"), "the state of p1 lacks owner: the stage 'owner' comes with its owner_share [block, chunks, chunk, 256]"),
    "no owner_share": (drop("owner_share"), "the state of p1 lacks owner_share"),
    "owner's residual gone": (owner(drop("residual")), "the state of p1, owner lacks its residual, float32 [256]"),
    "owner's threshold gone": (owner(drop("threshold")), "the state of p1, owner lacks its threshold"),
    "owner's counters gone": (owner(drop("counters")), "the state of p1, owner lacks its counters"),
    "residual too short": (put("residual", torch.zeros(299)), "p1 has 300 elements, its residual in the state has 299"),
    "residual not flat": (put("residual", torch.zeros(30, 10)), "p1: residual must be float32 [300], not float32 [30, 10]"),
    "residual no tensor": (put("residual", [0.0] * 300), "p1: residual must be float32 [300], not list [0.0"),
    "residual in half": (put("residual", residual(0).half()), "p1: residual must be float32 [300], not float16 [300]"),
    "residual NaN": (put("residual", residual(float("nan"))), "p1: residual has values that are NaN or infinite"),
    "residual infinite": (put("residual", residual(float("-inf"))), "p1: residual has values that are NaN or infinite"),
    "threshold a vector": (put("threshold", torch.ones(1)), "p1: threshold must be float32 [], not float32 [1]"),
    "threshold a number": (put("threshold", 0.5), "p1: threshold must be float32 [], not float 0.5"),
    "threshold NaN": (put("threshold", torch.tensor(float("nan"))), "p1: threshold must not be NaN"),
    "counters too many": (put("counters", torch.zeros(6, dtype=WHOLE)), "p1: counters must be int64 [5], not int64 [6]"),
    "counters as floats": (put("counters", torch.zeros(4)), "p1: counters must be int64 [5], not float32 [4]"),
    "counters negative": (put("counters", torch.tensor([3, 0, -2, 0])), "p1: counters has the value -2; it must count from 0"),
    "other tensor NaN": (put("right_factor", torch.tensor([float("nan")])), "p1: right_factor must not be NaN"),
    "owner's residual too long": (owner(put("residual", torch.zeros(257))), "p1, owner: residual must be float32 [256], not float32 [257]"),
    "owner's residual NaN": (owner(put("residual", torch.full((256,), float("nan")))), "p1, owner: residual has values that are NaN"),
    "owner no dict": (put("owner", torch.zeros(256)), "p1: owner must be a dict of tensors, not float32 [256]"),
    "owner_share too short": (put("owner_share", [256, 2]), "p1: owner_share must be [block, chunks, chunk, 256], with a chunk"),
    "owner_share past the end": (
        put("owner_share", [256, 2, 2]),
        "p1: owner_share must be [block, chunks, chunk, 256], with a chunk below",
    ),
    "owner_share of other units": (
        put("owner_share", [256, 2, 1, 64]),
        "p1: owner_share must be [block, chunks, chunk, 256], with a chunk",
    ),
    "owner_share of another": (put("owner_share", [256, 2, 1]), "p1, owner: residual must be float32 [44], not float32 [256]"),
    "owner_order of another": (
        put("owner_order", [[10, 20], [1, 0]]),
        "p1: owner_order must be [shape, dims] of 300 elements, not",
    ),
    "unknown stage": (put("reducer", {"residual": residual(0)}), "the state of p1 has the stage 'reducer'; the only one"),
}


def saved_by_owner() -> dict[str, Entry]:
    bucket = fill(BucketState([], state_spec(NUMELS, 2), torch.device("cpu")), 3)
    return {f"p{index}": bucket.saved(index) for index in range(2)}


@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_changes(name: str, used_before: bool) -> None:
    damage, message = DAMAGES[name]
    store, model = StateStore(), make_model(*NUMELS)
    if used_before:
        fill(store.bucket(list(model.values()), state_spec(NUMELS, 2)))
    before, saved = store.state_dict(model), saved_by_owner()
    damage(saved["p1"])
    with pytest.raises(ValueError, match=re.escape(message)):
        store.load_state_dict(model, saved)
    assert_same(store.state_dict(model), before)


@pytest.mark.parametrize("entry", [None, torch.zeros(300), [torch.zeros(300)]], ids=["nothing", "tensor", "list"])
def test_an_entry_that_is_no_dict_is_refused(entry: Any) -> None:
    with pytest.raises(ValueError, match="the state of p1 must be a dict of tensors, not "):
        StateStore().load_state_dict(make_model(*NUMELS), {**saved_by_owner(), "p1": entry})


def test_a_state_that_is_no_dict_is_refused() -> None:
    with pytest.raises(ValueError, match="a state is a dict by parameter name, not Tensor"):
        StateStore().load_state_dict(make_model(300), torch.zeros(300))  # type: ignore[arg-type]


def test_an_undamaged_state_is_loaded() -> None:
    store, model, saved = StateStore(), make_model(*NUMELS), saved_by_owner()
    fill(store.bucket(list(model.values()), state_spec(NUMELS, 2)))
    store.load_state_dict(model, saved)
    assert_same(store.state_dict(model), saved)


@pytest.mark.parametrize("scheme", ["random_k", "powersgd"])
def test_the_state_of_another_scheme_is_loaded(scheme: str) -> None:
    """It has no threshold: that starts afresh, and the counters with it."""
    site = make_gradient(1000)
    if scheme == "powersgd":
        entry = {"residual": torch.randn(1000), "right_factor": torch.randn(40), "counters": torch.arange(4)}
    else:
        offer = decide(site, gradient_scheme=scheme, min_numel=0).offer
        assert isinstance(offer, GradientOffer)
        entry = fill(BucketState([], offer.state, torch.device("cpu"))).saved(0)
    store, model = StateStore(), make_model(1000)
    bucket = fill(store.bucket(list(model.values()), state_spec([1000])))
    store.load_state_dict(model, {"p0": entry})
    assert torch.equal(bucket.tensors["residual"], entry["residual"])
    assert bucket.tensors["threshold"].tolist() == [float("inf")]
    assert bucket.tensors["counters"].tolist() == [[0] * 5]


def test_states_of_a_version_with_four_counters_are_loaded() -> None:
    """A threshold does not follow what it does not know: nothing was kept in the last step."""
    saved = saved_by_owner()
    earlier = {name: {**entry, "counters": entry["counters"][:4]} for name, entry in saved.items()}
    for entry in earlier.values():
        entry["owner"] = {**entry["owner"], "counters": entry["owner"]["counters"][:4]}
    for entry in saved.values():
        entry["counters"][4] = entry["owner"]["counters"][4] = 0
    store, model = StateStore(), make_model(*NUMELS)
    store.bucket(list(model.values()), state_spec(NUMELS, 2))
    store.load_state_dict(model, earlier)
    assert_same(store.state_dict(model), saved)


def named(*names: str) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(300)) for name in names})


def with_states(model: nn.ParameterDict, states: dict[str, int]) -> StateStore:
    """A store that holds so many different states of each parameter."""
    store = StateStore()
    for name, count in states.items():
        for number in range(count):
            bucket = fill(store.bucket([model[name]], state_spec([300], number and number + 1)), number)
            bucket.tensors["residual"].add_(len(name))
    return store


@pytest.mark.parametrize(
    ("states", "keys"),
    [
        ({"a": 2, "a@1": 1}, ["a", "a@1", "a@1@0"]),
        ({"a": 1, "a@1": 2, "a@1@0": 1}, ["a", "a@1@0", "a@1@0@0", "a@1@1"]),
        ({"user@home": 1}, ["user@home@0"]),
    ],
)
def test_names_with_an_at_sign_keep_their_states_apart(states: dict[str, int], keys: list[str]) -> None:
    model = named(*states)
    saved = with_states(model, states).state_dict(model)
    assert sorted(saved) == keys
    resumed, again = StateStore(), named(*states)
    resumed.load_state_dict(again, saved)
    assert_same(resumed.state_dict(again), saved)


@pytest.mark.parametrize("name", ["user@home", "a@1"])
def test_keys_of_older_versions_are_read_where_they_have_one_meaning(name: str) -> None:
    model = named(name)
    saved = with_states(model, {name: 1}).state_dict(model)
    (entry,) = saved.values()
    resumed, again = StateStore(), named(name)
    resumed.load_state_dict(again, {name: entry})
    assert_same(resumed.state_dict(again), saved)


def test_a_gap_in_the_numbers_is_refused() -> None:
    model = named("a")
    saved = with_states(model, {"a": 3}).state_dict(model)
    del saved["a@1"]
    with pytest.raises(ValueError, match=re.escape("the state lacks a@1: it has a, a@2, which must be numbered from 0 on")):
        StateStore().load_state_dict(named("a"), saved)
