"""Compressor state: found again by identity, moved and saved without losing a gradient."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dct_compile
from dct_compile.runtime import RUNTIME
from dct_compile.state import STATE_INPUTS, BucketState, StateStore, canonical_name
from dct_compile.triton_kernels.layout import GradientLayout, gradient_layout


def make_layout(numels: Sequence[int], chunks: int = 1, chunk: int = -1, block: int = 256) -> GradientLayout:
    """A bucket of parameters of these sizes, end to end."""
    segments = [number for i, numel in enumerate(numels) for number in (sum(numels[:i]), numel)]
    return gradient_layout(tuple(segments), block, chunks, chunk, 0.1, torch.bfloat16)


def geometry(numels: Sequence[int], ranks: int = 0, rank: int = 0, block: int = 256) -> tuple[GradientLayout, GradientLayout | None]:
    """Layouts of the "gather" scheme, or of "owner" for that many ranks."""
    if not ranks:
        return make_layout(numels, block=block), None
    return make_layout(numels, ranks, block=block), make_layout(numels, ranks, rank, block)


def make_model(*numels: int) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(numel)) for i, numel in enumerate(numels)})


def fill(bucket: BucketState, seed: int = 0) -> BucketState:
    """Random state, as after some steps."""
    generator = torch.Generator().manual_seed(seed)
    for stage in filter(None, (bucket.local, bucket.owner)):
        stage.residual.copy_(torch.randn(stage.residual.shape, generator=generator))
        stage.threshold.copy_(torch.rand(stage.threshold.shape, generator=generator))
        stage.counters.copy_(torch.randint(1, 100, stage.counters.shape, generator=generator))
    return bucket


def parts(store: StateStore, model: nn.Module) -> dict[str, Any]:
    return store.state_dict(model)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
        elif isinstance(value, dict):
            assert_same(value, other[key])
        else:
            assert value == other[key]


def test_initial_state() -> None:
    bucket = BucketState([], *geometry([300, 100]), torch.device("cpu"))
    residual, threshold, counters = bucket.tensors()
    assert (residual.dtype, residual.tolist()) == (torch.float32, [0.0] * 400)
    assert threshold.tolist() == [float("inf")] * 2
    assert (counters.dtype, counters.tolist()) == (torch.int64, [[0] * 4] * 2)


def test_owner_has_a_second_stage_for_its_share() -> None:
    bucket = BucketState([], *geometry([1000, 300], ranks=2, rank=1), torch.device("cpu"))
    assert len(bucket.tensors()) == len(STATE_INPUTS) == 6
    assert bucket.owner is not None
    assert bucket.owner.residual.numel() == (1000 - 512) + (300 - 256)
    assert bucket.entry(1)["owner"]["residual"].numel() == 44
    assert bucket.entry(1)["owner_share"] == [256, 2, 1]


def test_the_same_parameters_find_the_same_bucket() -> None:
    store, model = StateStore(), make_model(300, 100)
    bucket = store.bucket(list(model.values()), *geometry([300, 100]))
    assert store.bucket(list(model.values()), *geometry([300, 100])) is bucket
    other_capacity = gradient_layout((0, 300, 300, 100), 4096, 1, -1, 0.5, torch.float32)
    assert store.bucket(list(model.values()), other_capacity, None) is bucket


def test_offsets_in_the_buffer_do_not_matter() -> None:
    """The same parameters with a dense one between them keep their state."""
    store, model = StateStore(), make_model(300, 100)
    bucket = store.bucket(list(model.values()), *geometry([300, 100]))
    moved = gradient_layout((0, 300, 364, 100), 256, 1, -1, 0.1, torch.bfloat16)
    assert store.bucket(list(model.values()), moved, None) is bucket


def test_parameters_of_equal_shape_never_share() -> None:
    store, one, other = StateStore(), make_model(300), make_model(300)
    first = fill(store.bucket(list(one.values()), *geometry([300])))
    second = store.bucket(list(other.values()), *geometry([300]))
    assert second is not first
    assert float(second.local.residual.abs().sum()) == 0
    first.local.residual.zero_().add_(1)
    assert float(parts(store, other)["p0"]["residual"].sum()) == 0
    assert float(parts(store, one)["p0"]["residual"].sum()) == 300


def test_equal_parameters_in_another_order_are_another_bucket() -> None:
    store, model = StateStore(), make_model(100, 100)
    first, second = model.values()
    assert store.bucket([first, second], *geometry([100, 100])) is not store.bucket([second, first], *geometry([100, 100]))


def test_parts_are_views() -> None:
    store, model = StateStore(), make_model(300, 100)
    bucket = store.bucket(list(model.values()), *geometry([300, 100]))
    bucket.entry(1)["residual"].add_(2)
    bucket.entry(0)["counters"].add_(3)
    assert bucket.local.residual.tolist() == [0.0] * 300 + [2.0] * 100
    assert bucket.local.counters.tolist() == [[3] * 4, [0] * 4]


@pytest.mark.parametrize("ranks", [0, 2])
def test_rebuilt_buckets_take_the_state_along(ranks: int) -> None:
    """DDP rebuilds its buckets after the first step: other neighbours, other order, the same gradients waiting."""
    store, model = StateStore(), make_model(300, 700, 1000)
    first, second, third = model.values()
    old = [
        fill(store.bucket([first, second], *geometry([300, 700], ranks)), 1),
        fill(store.bucket([third], *geometry([1000], ranks)), 2),
    ]
    before = parts(store, model)
    new = [store.bucket([third, first], *geometry([1000, 300], ranks)), store.bucket([second], *geometry([700], ranks))]
    for bucket in new:
        store.move(old, bucket)
    store.retire(old)
    assert_same(before, parts(store, model))
    assert [len(list(store.entries(parameter))) for parameter in model.values()] == [1, 1, 1]


def test_parameters_that_were_in_no_bucket_start_afresh_when_moved() -> None:
    store, model = StateStore(), make_model(300, 100)
    first, second = model.values()
    old = fill(store.bucket([first], *geometry([300])))
    new = store.bucket([second, first], *geometry([100, 300]))
    store.move([old], new)
    assert float(new.entry(0)["residual"].abs().sum()) == 0
    assert torch.equal(new.entry(1)["residual"], old.local.residual)


def total_waiting(buckets: Sequence[BucketState], segment: int, numel: int) -> Tensor:
    """What waits to be sent for one parameter, over all ranks and both stages."""
    total = torch.zeros(numel, dtype=torch.float64)
    for rank, bucket in enumerate(buckets):
        entry = bucket.entry(segment)
        total += entry["residual"].double()
        if bucket.owner is not None:
            share = bucket.layout.all_pieces[rank * len(bucket.layout.segments) + segment]
            start = share.grad_offset - bucket.layout.segments[segment][0]
            total[start : start + share.numel] += entry["owner"]["residual"].double()
    return total


@pytest.mark.parametrize(
    ("old", "new"),
    [((4, 256), (0, 256)), ((4, 256), (4, 4096)), ((4, 256), (2, 256)), ((4, 4096), (4, 256))],
    ids=["to gather", "other block", "other number of ranks", "smaller block"],
)
def test_owned_share_is_folded_into_the_residual_when_the_geometry_changes(old: tuple[int, int], new: tuple[int, int]) -> None:
    """The sum over all ranks of what waits is the same before and after."""
    numels, device = [5000, 300], torch.device("cpu")
    before = [fill(BucketState([], *geometry(numels, old[0], rank, old[1]), device), rank) for rank in range(4)]
    after = [BucketState([], *geometry(numels, new[0], rank % max(1, new[0]), new[1]), device) for rank in range(4)]
    for source, target in zip(before, after, strict=True):
        for segment in range(2):
            target.write(segment, source.entry(segment))
    for segment, numel in enumerate(numels):
        waiting = sum(bucket.entry(segment)["residual"].double() for bucket in after)
        assert isinstance(waiting, Tensor)
        torch.testing.assert_close(waiting, total_waiting(before, segment, numel), rtol=0, atol=1e-5)
        for bucket in after:
            if bucket.owner is not None:
                entry = bucket.entry(segment)["owner"]
                assert float(entry["residual"].abs().sum()) == 0
                assert float(entry["threshold"]) == float("inf")


def test_same_geometry_keeps_the_owned_share() -> None:
    device = torch.device("cpu")
    source = fill(BucketState([], *geometry([1000, 300], 2, 1), device))
    target = fill(BucketState([], *geometry([300, 1000], 2, 1), device), 9)
    target.write(1, source.entry(0))
    assert_same(target.entry(1), source.entry(0))


def test_from_gather_to_owner_the_owner_starts_afresh() -> None:
    device = torch.device("cpu")
    source = fill(BucketState([], *geometry([1000]), device))
    target = fill(BucketState([], *geometry([1000], 2, 0), device), 9)
    target.write(0, source.entry(0))
    assert torch.equal(target.local.residual, source.local.residual)
    assert target.owner is not None
    assert float(target.owner.residual.abs().sum()) == 0


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("used_before", [True, False])
def test_saved_state_comes_back(ranks: int, used_before: bool) -> None:
    store, model, numels = StateStore(), make_model(1000, 300), [1000, 300]
    fill(store.bucket(list(model.values()), *geometry(numels, ranks)))
    saved = store.state_dict(model)

    resumed, again = StateStore(), make_model(1000, 300)
    if used_before:
        fill(resumed.bucket(list(again.values()), *geometry(numels, ranks)), 7)
    resumed.load_state_dict(again, saved)
    assert_same(resumed.state_dict(again), saved)
    bucket = resumed.bucket(list(again.values()), *geometry(numels, ranks))
    assert_same(resumed.state_dict(again), saved)
    assert_same(bucket.entry(1), saved["p1"])


def test_saved_state_is_a_copy() -> None:
    store, model = StateStore(), make_model(300)
    bucket = fill(store.bucket(list(model.values()), *geometry([300])))
    saved = store.state_dict(model)
    expected = saved["p0"]["residual"].clone()
    bucket.local.residual.zero_()
    assert torch.equal(saved["p0"]["residual"], expected)
    store.load_state_dict(model, saved)
    bucket.local.residual.zero_()
    assert torch.equal(saved["p0"]["residual"], expected)


def test_pending_state_is_a_copy_too() -> None:
    store, model = StateStore(), make_model(300)
    saved = {"p0": BucketState([], *geometry([300]), torch.device("cpu")).entry(0)}
    store.load_state_dict(model, saved)
    saved["p0"]["residual"].fill_(5)
    assert float(store.bucket(list(model.values()), *geometry([300])).local.residual.sum()) == 0


def test_saved_state_can_be_written_to_a_file(tmp_path: Any) -> None:
    store, model = StateStore(), make_model(300)
    fill(store.bucket(list(model.values()), *geometry([300], 2)))
    saved = store.state_dict(model)
    torch.save(saved, tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=True), saved)


def test_other_bucketing_after_loading() -> None:
    store, model = StateStore(), make_model(300, 100)
    fill(store.bucket(list(model.values()), *geometry([300, 100])))
    saved = store.state_dict(model)
    resumed, again = StateStore(), make_model(300, 100)
    resumed.load_state_dict(again, saved)
    for parameter, numel in zip(again.values(), (300, 100), strict=True):
        resumed.bucket([parameter], *geometry([numel]))
    assert_same(resumed.state_dict(again), saved)


def test_missing_parameters_start_afresh() -> None:
    store, model = StateStore(), make_model(300, 100)
    bucket = fill(store.bucket(list(model.values()), *geometry([300, 100])))
    saved = store.state_dict(model)
    store.load_state_dict(model, {"p1": saved["p1"]})
    assert float(bucket.entry(0)["residual"].abs().sum()) == 0
    assert_same(bucket.entry(1), saved["p1"])


@pytest.mark.parametrize("ranks", [0, 2])
def test_empty_state_resets(ranks: int) -> None:
    store, model = StateStore(), make_model(1000)
    bucket = fill(store.bucket(list(model.values()), *geometry([1000], ranks)))
    store.load_state_dict(model, {})
    fresh = BucketState([], *geometry([1000], ranks), torch.device("cpu"))
    assert all(torch.equal(one, other) for one, other in zip(bucket.tensors(), fresh.tensors(), strict=True))


def test_empty_state_resets_what_waits_for_first_use() -> None:
    store, model = StateStore(), make_model(300)
    entry = fill(BucketState([], *geometry([300]), torch.device("cpu"))).entry(0)
    store.load_state_dict(model, {"p0": entry})
    store.load_state_dict(model, {})
    assert store.state_dict(model) == {}
    assert float(store.bucket(list(model.values()), *geometry([300])).local.residual.abs().sum()) == 0


def test_resetting_one_model_leaves_others_alone() -> None:
    store, one, other = StateStore(), make_model(300), make_model(300)
    for model in (one, other):
        fill(store.bucket(list(model.values()), *geometry([300])))
    store.load_state_dict(one, {})
    assert float(store.state_dict(other)["p0"]["residual"].abs().sum()) > 0


def test_unknown_names_are_refused() -> None:
    store, model = StateStore(), make_model(300)
    bucket = fill(store.bucket(list(model.values()), *geometry([300])))
    saved = store.state_dict(model)
    with pytest.raises(ValueError, match=r"names parameters that the model does not have: other.*it has p0"):
        store.load_state_dict(model, {**saved, "other": saved["p0"]})
    assert torch.equal(bucket.local.residual, saved["p0"]["residual"])


@pytest.mark.parametrize("used_before", [True, False])
def test_wrong_sizes_are_refused_and_nothing_changes(used_before: bool) -> None:
    store, model = StateStore(), make_model(300, 100)
    if used_before:
        fill(store.bucket(list(model.values()), *geometry([300, 100])))
    before = store.state_dict(model)
    fitting, wrong = (fill(BucketState([], *geometry([numel]), torch.device("cpu")), 3).entry(0) for numel in (300, 99))
    with pytest.raises(ValueError, match="p1 has 100 elements, its residual in the state has 99"):
        store.load_state_dict(model, {"p0": fitting, "p1": wrong})
    assert_same(store.state_dict(model), before)


def test_part_of_another_size_is_refused() -> None:
    bucket = BucketState([], *geometry([300]), torch.device("cpu"))
    wrong = BucketState([], *geometry([299]), torch.device("cpu")).entry(0)
    with pytest.raises(ValueError, match="299"):
        bucket.write(0, wrong)


def test_parameter_compressed_by_two_graphs_has_numbered_keys() -> None:
    store, model = StateStore(), make_model(300, 100)
    first, second = model.values()
    fill(store.bucket([first], *geometry([300])), 1)
    fill(store.bucket([first, second], *geometry([300, 100])), 2)
    saved = store.state_dict(model)
    assert sorted(saved) == ["p0", "p0@1", "p1"]
    resumed, again = StateStore(), make_model(300, 100)
    resumed.load_state_dict(again, saved)
    assert_same(resumed.state_dict(again), saved)
    third, fourth = again.values()
    resumed.bucket([third], *geometry([300]))
    assert_same(resumed.state_dict(again), saved)
    resumed.bucket([third, fourth], *geometry([300, 100]))
    assert_same(resumed.state_dict(again), saved)


def test_state_goes_when_its_parameters_go() -> None:
    store, model, kept = StateStore(), make_model(300), make_model(100)
    fill(store.bucket(list(model.values()), *geometry([300])))
    del model
    gc.collect()
    store.bucket(list(kept.values()), *geometry([100]))
    assert [bucket.layout.segments for bucket in store._buckets] == [((0, 100),)]


def test_loaded_state_goes_when_its_parameters_go() -> None:
    store, model, kept = StateStore(), make_model(300), make_model(100)
    store.load_state_dict(model, {"p0": BucketState([], *geometry([300]), torch.device("cpu")).entry(0)})
    del model
    gc.collect()
    store.bucket(list(kept.values()), *geometry([100]))
    assert store._pending == []


def test_new_parameter_in_the_place_of_a_dead_one_starts_afresh() -> None:
    store, layouts = StateStore(), geometry([300])
    parameter = nn.Parameter(torch.zeros(300))
    fill(store.bucket([parameter], *layouts))
    del parameter
    gc.collect()
    assert float(store.bucket([nn.Parameter(torch.zeros(300))], *layouts).local.residual.abs().sum()) == 0


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("layer.weight", "layer.weight"),
        ("module.layer.weight", "layer.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("_orig_mod.module.layer.weight", "layer.weight"),
        ("module.module._orig_mod.layer.0.weight", "layer.0.weight"),
        ("layer._orig_mod.weight", "layer.weight"),
        ("modules.weight", "modules.weight"),
    ],
)
def test_names_have_no_wrapper_prefixes(name: str, wanted: str) -> None:
    assert canonical_name(name) == wanted


def test_models_own_child_called_module_keeps_its_name_apart() -> None:
    """A wrapper's prefix must not make two parameters one."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(300))
            self.module = nn.Linear(10, 30, bias=False)

    store, model = StateStore(), Own()
    for seed, parameter in enumerate(model.parameters()):
        fill(store.bucket([parameter], *geometry([300])), seed)
    saved = store.state_dict(model)
    assert len(saved) == 2
    resumed, again = StateStore(), Own()
    resumed.load_state_dict(again, saved)
    for parameter in again.parameters():
        resumed.bucket([parameter], *geometry([300]))
    assert_same(resumed.state_dict(again), saved)


def test_saved_by_a_wrapped_model_loaded_by_a_plain_one() -> None:
    store, model = StateStore(), nn.Linear(30, 10, bias=False)
    compiled = torch.compile(model)
    fill(store.bucket([model.weight], *geometry([300])))
    saved = store.state_dict(compiled)
    assert list(saved) == ["weight"]
    store.load_state_dict(model, saved)
    store.load_state_dict(compiled, {})
    assert float(store.state_dict(model)["weight"]["residual"].abs().sum()) == 0


def test_public_functions_use_the_process_wide_state() -> None:
    model = make_model(300)
    fill(RUNTIME.states.bucket(list(model.values()), *geometry([300])))
    saved = dct_compile.state_dict(model)
    dct_compile.load_state_dict(model, {})
    assert float(dct_compile.state_dict(model)["p0"]["residual"].abs().sum()) == 0
    dct_compile.load_state_dict(model, saved)
    assert_same(dct_compile.state_dict(model), saved)
