"""Saving and restoring compressor state."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.runtime import RUNTIME
from dct_compile.state.bucket import BucketState
from dct_compile.state.store import StateStore, named_parameters
from tests.states import assert_same, fill, make_model, state_spec
from tests.tracing import fake_group


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("used_before", [True, False])
def test_saved_state_comes_back(ranks: int, used_before: bool) -> None:
    store, model, numels = StateStore(), make_model(1000, 300), [1000, 300]
    fill(store.bucket(list(model.values()), state_spec(numels, ranks)))
    saved = store.state_dict(model)

    resumed, again = StateStore(), make_model(1000, 300)
    if used_before:
        fill(resumed.bucket(list(again.values()), state_spec(numels, ranks)), 7)
    resumed.load_state_dict(again, saved)
    assert_same(resumed.state_dict(again), saved)
    bucket = resumed.bucket(list(again.values()), state_spec(numels, ranks))
    assert_same(resumed.state_dict(again), saved)
    assert_same(bucket.entry(1), saved["p1"])


def test_saved_state_is_a_copy() -> None:
    store, model = StateStore(), make_model(300)
    bucket = fill(store.bucket(list(model.values()), state_spec([300])))
    saved = store.state_dict(model)
    expected = saved["p0"]["residual"].clone()
    bucket.tensors["residual"].zero_()
    assert torch.equal(saved["p0"]["residual"], expected)
    store.load_state_dict(model, saved)
    bucket.tensors["residual"].zero_()
    assert torch.equal(saved["p0"]["residual"], expected)


def test_pending_state_is_a_copy_too() -> None:
    store, model = StateStore(), make_model(300)
    saved = {"p0": BucketState([], state_spec([300]), torch.device("cpu")).entry(0)}
    store.load_state_dict(model, saved)
    saved["p0"]["residual"].fill_(5)
    assert float(store.bucket(list(model.values()), state_spec([300])).tensors["residual"].sum()) == 0


def test_saved_state_can_be_written_to_a_file(tmp_path: Any) -> None:
    store, model = StateStore(), make_model(300)
    fill(store.bucket(list(model.values()), state_spec([300], 2)))
    saved = store.state_dict(model)
    torch.save(saved, tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=True), saved)


def test_other_bucketing_after_loading() -> None:
    store, model = StateStore(), make_model(300, 100)
    fill(store.bucket(list(model.values()), state_spec([300, 100])))
    saved = store.state_dict(model)
    resumed, again = StateStore(), make_model(300, 100)
    resumed.load_state_dict(again, saved)
    for parameter, numel in zip(again.values(), (300, 100), strict=True):
        resumed.bucket([parameter], state_spec([numel]))
    assert_same(resumed.state_dict(again), saved)


def test_missing_parameters_start_afresh() -> None:
    store, model = StateStore(), make_model(300, 100)
    bucket = fill(store.bucket(list(model.values()), state_spec([300, 100])))
    saved = store.state_dict(model)
    store.load_state_dict(model, {"p1": saved["p1"]})
    assert float(bucket.entry(0)["residual"].abs().sum()) == 0
    assert_same(bucket.entry(1), saved["p1"])


@pytest.mark.parametrize("ranks", [0, 2])
def test_empty_state_resets(ranks: int) -> None:
    store, model = StateStore(), make_model(1000)
    bucket = fill(store.bucket(list(model.values()), state_spec([1000], ranks)))
    store.load_state_dict(model, {})
    fresh = BucketState([], state_spec([1000], ranks), torch.device("cpu"))
    assert all(torch.equal(one, other) for one, other in zip(bucket.tensors.values(), fresh.tensors.values(), strict=True))


def test_empty_state_resets_what_waits_for_first_use() -> None:
    store, model = StateStore(), make_model(300)
    entry = fill(BucketState([], state_spec([300]), torch.device("cpu"))).entry(0)
    store.load_state_dict(model, {"p0": entry})
    store.load_state_dict(model, {})
    assert store.state_dict(model) == {}
    assert float(store.bucket(list(model.values()), state_spec([300])).tensors["residual"].abs().sum()) == 0


def test_resetting_one_model_leaves_others_alone() -> None:
    store, one, other = StateStore(), make_model(300), make_model(300)
    for model in (one, other):
        fill(store.bucket(list(model.values()), state_spec([300])))
    store.load_state_dict(one, {})
    assert float(store.state_dict(other)["p0"]["residual"].abs().sum()) > 0


def test_unknown_names_are_refused() -> None:
    store, model = StateStore(), make_model(300)
    bucket = fill(store.bucket(list(model.values()), state_spec([300])))
    saved = store.state_dict(model)
    with pytest.raises(ValueError, match=r"names parameters that the model does not have: other.*it has p0"):
        store.load_state_dict(model, {**saved, "other": saved["p0"]})
    assert torch.equal(bucket.tensors["residual"], saved["p0"]["residual"])


@pytest.mark.parametrize("used_before", [True, False])
def test_wrong_sizes_are_refused_and_nothing_changes(used_before: bool) -> None:
    store, model = StateStore(), make_model(300, 100)
    if used_before:
        fill(store.bucket(list(model.values()), state_spec([300, 100])))
    before = store.state_dict(model)
    fitting, wrong = (fill(BucketState([], state_spec([numel]), torch.device("cpu")), 3).entry(0) for numel in (300, 99))
    with pytest.raises(ValueError, match="p1 has 100 elements, its residual in the state has 99"):
        store.load_state_dict(model, {"p0": fitting, "p1": wrong})
    assert_same(store.state_dict(model), before)


def test_part_of_another_size_is_refused() -> None:
    bucket = BucketState([], state_spec([300]), torch.device("cpu"))
    wrong = BucketState([], state_spec([299]), torch.device("cpu")).entry(0)
    with pytest.raises(ValueError, match="299"):
        bucket.write(0, wrong)


def test_parameter_compressed_by_two_graphs_has_numbered_keys() -> None:
    store, model = StateStore(), make_model(300, 100)
    first, second = model.values()
    fill(store.bucket([first], state_spec([300])), 1)
    fill(store.bucket([first, second], state_spec([300, 100])), 2)
    saved = store.state_dict(model)
    assert sorted(saved) == ["p0", "p0@1", "p1"]
    resumed, again = StateStore(), make_model(300, 100)
    resumed.load_state_dict(again, saved)
    assert_same(resumed.state_dict(again), saved)
    third, fourth = again.values()
    resumed.bucket([third], state_spec([300]))
    assert_same(resumed.state_dict(again), saved)
    resumed.bucket([third, fourth], state_spec([300, 100]))
    assert_same(resumed.state_dict(again), saved)


def test_names_have_no_wrapper_prefixes() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ModuleDict({"module": nn.Linear(2, 2, bias=False)}))
    with fake_group(2):
        inner = DistributedDataParallel(model)
        outer = DistributedDataParallel(torch.compile(model))
        for wrapped in (model, inner, torch.compile(model), torch.compile(DistributedDataParallel(inner)), outer):
            assert [name for name, _ in named_parameters(wrapped)] == ["0.weight", "1.module.weight"]


def test_models_own_child_called_module_keeps_its_name_apart() -> None:
    """A wrapper's prefix must not make two parameters one."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(300))
            self.module = nn.Linear(10, 30, bias=False)

    store, model = StateStore(), Own()
    for seed, parameter in enumerate(model.parameters()):
        fill(store.bucket([parameter], state_spec([300])), seed)
    saved = store.state_dict(model)
    assert len(saved) == 2
    resumed, again = StateStore(), Own()
    resumed.load_state_dict(again, saved)
    for parameter in again.parameters():
        resumed.bucket([parameter], state_spec([300]))
    assert_same(resumed.state_dict(again), saved)


def test_saved_by_a_wrapped_model_loaded_by_a_plain_one() -> None:
    store, model = StateStore(), nn.Linear(30, 10, bias=False)
    compiled = torch.compile(model)
    fill(store.bucket([model.weight], state_spec([300])))
    saved = store.state_dict(compiled)
    assert list(saved) == ["weight"]
    store.load_state_dict(model, saved)
    store.load_state_dict(compiled, {})
    assert float(store.state_dict(model)["weight"]["residual"].abs().sum()) == 0


def test_public_functions_use_the_process_wide_state() -> None:
    model = make_model(300)
    fill(RUNTIME.states.bucket(list(model.values()), state_spec([300])))
    saved = dct_compile.state_dict(model)
    dct_compile.load_state_dict(model, {})
    assert float(dct_compile.state_dict(model)["p0"]["residual"].abs().sum()) == 0
    dct_compile.load_state_dict(model, saved)
    assert_same(dct_compile.state_dict(model), saved)
