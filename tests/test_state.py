"""Compressor state: found again by identity, moved without losing a gradient, freed with its parameters."""

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from dct_compile.schemes.threshold import Gather
from dct_compile.state.bucket import BucketState
from dct_compile.state.entry import share_of
from dct_compile.state.store import StateStore
from tests.hand_made_sites import decide, make_gradient
from tests.states import assert_same, fill, make_model, state_spec


def test_initial_state() -> None:
    bucket = BucketState([], state_spec([300, 100]), torch.device("cpu"))
    residual, threshold, counters = bucket.tensors.values()
    assert (residual.dtype, residual.tolist()) == (torch.float32, [0.0] * 400)
    assert threshold.tolist() == [float("inf")] * 2
    assert (counters.dtype, counters.tolist()) == (torch.int64, [[0] * 5] * 2)


def test_owner_has_a_second_stage_for_its_share() -> None:
    bucket = BucketState([], state_spec([1000, 300], ranks=2, rank=1), torch.device("cpu"))
    own = ["residual", "threshold", "counters"]
    assert list(bucket.tensors) == own + [f"owner_{name}" for name in own]
    assert bucket.tensors["owner_residual"].numel() == (1000 - 512) + (300 - 256)
    assert bucket.entry(1)["owner"]["residual"].numel() == 44
    assert bucket.entry(1)["owner_share"] == [256, 2, 1, 256]


def test_the_same_parameters_find_the_same_bucket() -> None:
    store, model = StateStore(), make_model(300, 100)
    bucket = store.bucket(list(model.values()), state_spec([300, 100]))
    assert store.bucket(list(model.values()), state_spec([300, 100])) is bucket
    other_block = state_spec([300, 100], density=0.001)
    assert store.bucket(list(model.values()), other_block) is bucket


def test_offsets_in_the_buffer_do_not_matter() -> None:
    """The same parameters with a dense one between them keep their state."""
    store, model = StateStore(), make_model(300, 100)
    bucket = store.bucket(list(model.values()), state_spec([300, 100]))
    between = decide(make_gradient(300, 64, 100, ranks=2), gradient_scheme="gather", exempt=["p1"], min_numel=0).offer
    assert isinstance(between, Gather)
    assert between.codec.layout.segments == ((0, 300), (364, 100))
    assert store.bucket(list(model.values()), between.state) is bucket


def test_parameters_of_equal_shape_never_share() -> None:
    store, one, other = StateStore(), make_model(300), make_model(300)
    first = fill(store.bucket(list(one.values()), state_spec([300])))
    second = store.bucket(list(other.values()), state_spec([300]))
    assert second is not first
    assert float(second.tensors["residual"].abs().sum()) == 0
    first.tensors["residual"].zero_().add_(1)
    assert float(store.state_dict(other)["p0"]["residual"].sum()) == 0
    assert float(store.state_dict(one)["p0"]["residual"].sum()) == 300


def test_equal_parameters_in_another_order_are_another_bucket() -> None:
    store, model = StateStore(), make_model(100, 100)
    first, second = model.values()
    assert store.bucket([first, second], state_spec([100, 100])) is not store.bucket([second, first], state_spec([100, 100]))


def test_parts_are_views() -> None:
    store, model = StateStore(), make_model(300, 100)
    bucket = store.bucket(list(model.values()), state_spec([300, 100]))
    bucket.entry(1)["residual"].add_(2)
    bucket.entry(0)["counters"].add_(3)
    assert bucket.tensors["residual"].tolist() == [0.0] * 300 + [2.0] * 100
    assert bucket.tensors["counters"].tolist() == [[3] * 5, [0] * 5]


@pytest.mark.parametrize("ranks", [0, 2])
def test_rebuilt_buckets_take_the_state_along(ranks: int) -> None:
    """DDP rebuilds its buckets after the first step: other neighbours, other order, the same gradients waiting."""
    store, model = StateStore(), make_model(300, 700, 1000)
    first, second, third = model.values()
    fill(store.bucket([first, second], state_spec([300, 700], ranks), family="DDP"), 1)
    fill(store.bucket([third], state_spec([1000], ranks), family="DDP"), 2)
    before = store.state_dict(model)
    store.bucket([third, first], state_spec([1000, 300], ranks), family="DDP")
    store.bucket([second], state_spec([700], ranks), family="DDP")
    assert_same(before, store.state_dict(model))
    assert [len(list(store.entries(parameter))) for parameter in model.values()] == [1, 1, 1]


def test_parameters_that_were_in_no_bucket_start_afresh_when_moved() -> None:
    store, model = StateStore(), make_model(300, 100)
    first, second = model.values()
    old = fill(store.bucket([first], state_spec([300]), family="DDP"))
    new = store.bucket([second, first], state_spec([100, 300]), family="DDP")
    assert float(new.entry(0)["residual"].abs().sum()) == 0
    assert torch.equal(new.entry(1)["residual"], old.tensors["residual"])


def test_a_familys_state_waits_while_its_parameter_is_in_no_bucket() -> None:
    """As that of a layer that is frozen for a while."""
    store, model = StateStore(), make_model(300, 100)
    first, second = model.values()
    fill(store.bucket([first, second], state_spec([300, 100]), family="DDP"))
    before = store.state_dict(model)
    store.bucket([second], state_spec([100]), family="DDP")
    assert_same(before, store.state_dict(model))
    store.bucket([second, first], state_spec([100, 300]), family="DDP")
    assert_same(before, store.state_dict(model))
    assert [bucket.spec.numels for bucket in store._buckets] == [(100, 300)]


def test_a_familys_state_is_handed_on_to_another_scheme() -> None:
    store, model = StateStore(), make_model(300)
    held = fill(store.bucket(list(model.values()), state_spec([300]), family="DDP")).tensors["residual"]
    taken = store.bucket(list(model.values()), state_spec([300], 2), family="DDP")
    assert torch.equal(taken.tensors["residual"], held)
    assert list(store.state_dict(model)) == ["p0"]


@pytest.mark.parametrize("family", ["", "DDP"])
def test_state_outlives_a_parameter_beside_it(family: str) -> None:
    store, model = StateStore(), make_model(300, 100)
    kept = model["p0"]
    before = fill(store.bucket(list(model.values()), state_spec([300, 100]), family=family)).entry(0)["residual"].clone()
    del model
    gc.collect()
    other = nn.Parameter(torch.zeros(100))
    assert torch.equal(store.bucket([other, kept], state_spec([100, 300]), family=family).entry(1)["residual"], before)
    assert len(list(store.entries(kept))) == 1


def test_the_states_of_two_graphs_stay_apart_beside_that_of_ddp() -> None:
    store, model = StateStore(), make_model(300, 100)
    first, second = model.values()
    graphs = [fill(store.bucket([first], state_spec([300])), 1), fill(store.bucket([first, second], state_spec([300, 100])), 2)]
    before = [graph.tensors["residual"].clone() for graph in graphs]
    for order in ([first, second], [second, first]):
        store.bucket(order, state_spec([parameter.numel() for parameter in order], 2), family="DDP")
    assert sorted(store.state_dict(model)) == ["p0", "p0@1", "p0@2", "p1", "p1@1"]
    assert all(torch.equal(graph.tensors["residual"], residual) for graph, residual in zip(graphs, before, strict=True))


def total_waiting(buckets: Sequence[BucketState], segment: int, numel: int) -> Tensor:
    """What waits to be sent for one parameter, over all ranks and both stages."""
    entries = [bucket.entry(segment) for bucket in buckets]
    total = torch.stack([entry["residual"].double() for entry in entries]).sum(0)
    owned = [entry["owner"]["residual"].double() for entry in entries if "owner" in entry]
    if not owned:
        return total
    elements = torch.cat([share_of(numel, entry["owner_share"]) for entry in entries])
    assert torch.equal(elements.sort().values, torch.arange(numel)), "the shares of all ranks are the parameter"
    return total.index_add(0, elements, torch.cat(owned))


@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 0.01), (0, 0.01)), ((4, 0.01), (4, 0.001)), ((4, 0.01), (2, 0.01)), ((4, 0.001), (4, 0.01))],
    ids=["to gather", "other block", "other number of ranks", "smaller block"],
)
def test_owned_share_is_folded_into_the_residual_when_the_geometry_changes(old: tuple[int, float], new: tuple[int, float]) -> None:
    """The sum over all ranks of what waits is the same before and after."""
    numels, device = [5000, 300], torch.device("cpu")
    before = [fill(BucketState([], state_spec(numels, old[0], rank, old[1]), device), rank) for rank in range(4)]
    after = [BucketState([], state_spec(numels, new[0], rank % max(1, new[0]), new[1]), device) for rank in range(4)]
    for source, target in zip(before, after, strict=True):
        for segment in range(2):
            target.write(segment, source.entry(segment))
    for segment, numel in enumerate(numels):
        waiting = sum(bucket.entry(segment)["residual"].double() for bucket in after)
        assert isinstance(waiting, Tensor)
        torch.testing.assert_close(waiting, total_waiting(before, segment, numel), rtol=0, atol=1e-5)
        for bucket in after:
            if bucket.spec.owner_share is not None:
                entry = bucket.entry(segment)["owner"]
                assert float(entry["residual"].abs().sum()) == 0
                assert float(entry["threshold"]) == float("inf")


@pytest.mark.parametrize("ranks", [0, 4], ids=["to gather", "to the same ranks"])
def test_a_share_that_was_saved_as_one_run_is_folded_into_its_elements(ranks: int) -> None:
    """As states were saved before the units of a parameter went to the owners in turn: 5000 elements in runs of 5 blocks of 256."""
    device = torch.device("cpu")
    source = fill(BucketState([], state_spec([5000]), device)).saved(0)
    for chunk, held in enumerate((1280, 1280, 1280, 1160)):
        owner = {**source, "residual": torch.full((held,), 10.0)}
        target = BucketState([], state_spec([5000], ranks, chunk if ranks else 0), device)
        target.write(0, {**source, "owner": owner, "owner_share": [256, 4, chunk]})
        expected = source["residual"].clone()
        expected[1280 * chunk : 1280 * chunk + held] += 10
        assert torch.equal(target.entry(0)["residual"], expected)
        assert not ranks or not target.tensors["owner_residual"].any()


def test_same_geometry_keeps_the_owned_share() -> None:
    device = torch.device("cpu")
    source = fill(BucketState([], state_spec([1000, 300], 2, 1), device))
    target = fill(BucketState([], state_spec([300, 1000], 2, 1), device), 9)
    target.write(1, source.entry(0))
    assert_same(target.entry(1), source.entry(0))


def test_from_gather_to_owner_the_owner_starts_afresh() -> None:
    device = torch.device("cpu")
    source = fill(BucketState([], state_spec([1000]), device))
    target = fill(BucketState([], state_spec([1000], 2, 0), device), 9)
    target.write(0, source.entry(0))
    assert torch.equal(target.tensors["residual"], source.tensors["residual"])
    assert float(target.tensors["owner_residual"].abs().sum()) == 0


def test_state_goes_when_its_parameters_go() -> None:
    store, model, kept = StateStore(), make_model(300), make_model(100)
    fill(store.bucket(list(model.values()), state_spec([300])))
    del model
    gc.collect()
    store.bucket(list(kept.values()), state_spec([100]))
    assert [bucket.spec.numels for bucket in store._buckets] == [(100,)]


def test_loaded_state_goes_when_its_parameters_go() -> None:
    store, model, kept = StateStore(), make_model(300), make_model(100)
    store.load_state_dict(model, {"p0": BucketState([], state_spec([300]), torch.device("cpu")).entry(0)})
    del model
    gc.collect()
    store.bucket(list(kept.values()), state_spec([100]))
    assert store._pending == []


def test_new_parameter_in_the_place_of_a_dead_one_starts_afresh() -> None:
    store, spec = StateStore(), state_spec([300])
    parameter = nn.Parameter(torch.zeros(300))
    fill(store.bucket([parameter], spec))
    del parameter
    gc.collect()
    assert float(store.bucket([nn.Parameter(torch.zeros(300))], spec).tensors["residual"].abs().sum()) == 0
