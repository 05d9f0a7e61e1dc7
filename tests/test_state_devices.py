"""Compressor state and devices: it lies where gradients are exchanged, and follows them there. "meta" stands for a GPU."""

import pytest
import torch

from dct_compile.state.bucket import BucketState
from dct_compile.state.store import StateStore
from tests.states import assert_same, fill, make_model, state_spec

META = torch.device("meta")


@pytest.mark.parametrize("family", ["", "FSDP"])
def test_the_state_of_offloaded_parameters_is_where_gradients_are_exchanged(family: str) -> None:
    store, model = StateStore(), make_model(300, 100)
    parameters = list(model.values())
    bucket = store.bucket(parameters, state_spec([300, 100]), family, META)
    assert {tensor.device for tensor in bucket.tensors.values()} == {META}
    assert store.bucket(parameters, state_spec([300, 100]), family, META) is bucket


@pytest.mark.parametrize("family", ["", "FSDP"])
def test_the_state_follows_gradients_to_another_device(family: str) -> None:
    store, model = StateStore(), make_model(300, 100)
    parameters = list(model.values())
    fill(store.bucket(parameters, state_spec([300, 100]), family))
    moved = store.bucket(parameters, state_spec([300, 100]), family, META)
    assert {tensor.device for tensor in moved.tensors.values()} == {META}
    assert [len(list(store.entries(parameter))) for parameter in parameters] == [1, 1]
    assert [bucket.device for bucket in store._buckets] == [META]


@pytest.mark.parametrize("pending", [False, True])
def test_a_state_that_moves_keeps_its_values(monkeypatch: pytest.MonkeyPatch, pending: bool) -> None:
    store, model = StateStore(), make_model(300, 100)
    parameters = list(model.values())
    held = fill(store.bucket(parameters, state_spec([300, 100])))
    before = store.state_dict(model)
    if pending:
        for parameter, use in zip(parameters, store.use.of(parameters), strict=True):
            parameter.grad, use.steps = torch.ones_like(parameter), 1
        held.pending.begin(keep=True)
        fill(held, 7)
    after = {f"p{index}": held.saved(index) for index in range(2)}
    elsewhere = property(lambda bucket: META if bucket is held else torch.device("cpu"))
    monkeypatch.setattr(BucketState, "device", elsewhere)
    moved = store.bucket(parameters, state_spec([300, 100]))
    assert moved is not held
    assert held.is_given_up
    assert_same({f"p{index}": moved.saved(index) for index in range(2)}, after)
    if pending:
        store.discard(model)
        assert_same(store.state_dict(model), before)
