"""The phases of a training: their densities, and the number of exchanges that they follow from, as it is counted and saved."""

import io
import re
from typing import Any

import pytest
import torch

import dct_compile
from dct_compile.config import DCTConfig
from dct_compile.phases import phase_at, phases_of
from dct_compile.runtime import RUNTIME
from dct_compile.state.entry import fold_share
from dct_compile.state.exchanges import PAST_ALL, count_exchange, exchanges_of
from dct_compile.state.ranks import StateDict, state_for
from dct_compile.state.store import StateStore
from tests.hand_made_sites import decide, make_gradient
from tests.states import fill, make_model, state_spec

SCHEDULES: list[tuple[dict[str, Any], list[tuple[int, float]]]] = [
    ({}, [(0, 0.01)]),
    ({"start_iter": 5}, [(0, 1.0), (5, 0.01)]),
    ({"density_warmup": 300}, [(0, 0.25), (100, 0.0625), (200, 0.015625), (300, 0.01)]),
    ({"start_iter": 5, "density_warmup": 2}, [(0, 1.0), (5, 0.0625), (6, 0.015625), (7, 0.01)]),
    ({"dp_density": 0.001, "density_warmup": 4}, [(0, 0.25), (1, 0.0625), (2, 0.015625), (3, 0.00390625), (4, 0.001)]),
    ({"dp_density": 0.25, "density_warmup": 100}, [(0, 0.25)]),
    ({"dp_density": 1, "start_iter": 5, "density_warmup": 100}, [(0, 1.0)]),
    ({"start_iter": 2, "density_warmup": {7: 0.1, 0: 0.5, 9: 0.01}}, [(0, 1.0), (2, 0.5), (9, 0.1), (11, 0.01)]),
    ({"start_iter": 2, "density_warmup": {0: 1, 3: 0.01}}, [(0, 1.0), (5, 0.01)]),
]


@pytest.mark.parametrize(("options", "expected"), SCHEDULES)
def test_densities_follow_the_schedule(options: dict[str, Any], expected: list[tuple[int, float]]) -> None:
    phases = phases_of(DCTConfig(**options))
    assert [(phase.first, phase.config.dp_density) for phase in phases] == expected
    assert [phase.until for phase in phases] == [*(first for first, _ in expected[1:]), None]


def test_a_phase_has_all_other_options_and_one_phase() -> None:
    config = DCTConfig(dp_density=0.05, start_iter=3, density_warmup={0: 0.1, 4: 0.05}, min_numel=7)
    expected = [{"dp_density": 1}, {"dp_density": 0.1, "refresh_interval": 1}, {"dp_density": 0.05}]
    assert [phase.config for phase in phases_of(config)] == [DCTConfig(**own, min_numel=7) for own in expected]
    assert all(len(phases_of(phase.config)) == 1 for phase in phases_of(config))


def test_a_warm_up_chooses_its_thresholds_at_every_step() -> None:
    """The last phase does as the options say."""
    phases = phases_of(DCTConfig(density_warmup=120, refresh_interval=500, parameter_densities={"head.*": 0.5}))
    assert [(phase.config.refresh_interval, phase.config.density_of("head.weight")) for phase in phases] == [(1, 0.5)] * 3 + [(500, 0.5)]


def test_a_number_of_exchanges_has_one_phase() -> None:
    phases = phases_of(DCTConfig(start_iter=2, density_warmup={0: 0.1, 3: 0.01}))
    assert [phases.index(phase_at(phases, number)) for number in (0, 1, 2, 4, 5, PAST_ALL)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("scheme", ["gather", "owner", "powersgd", "random_k"])
def test_a_dense_phase_is_dense_under_every_scheme(scheme: str) -> None:
    first, *_ = phases_of(DCTConfig(gradient_scheme=scheme, start_iter=1))
    assert decide(make_gradient(64 * 64), dp_density=first.config.dp_density, gradient_scheme=scheme).offer is None


def test_low_rank_factors_have_no_density_to_warm_up() -> None:
    with pytest.raises(ValueError, match=re.escape("option 'density_warmup' is 9 (int); allowed is 0 with gradient_scheme='powersgd'")):
        DCTConfig(gradient_scheme="powersgd", density_warmup=9)


@pytest.mark.parametrize("scheme", ["gather", "owner", "random_k"])
def test_residuals_come_through_all_densities(scheme: str) -> None:
    """With ``random_k``, and where ``owner`` takes larger blocks, the state of another density is another one."""
    store, model = StateStore(), make_model(5000, 700)
    parameters, waiting = list(model.values()), []
    for density in (0.25, 0.0625, 0.01, 0.001):
        offer = decide(make_gradient(5000, 700, ranks=3, rank=1), gradient_scheme=scheme, dp_density=density, min_numel=0).offer
        bucket = store.bucket(parameters, offer.state, "DDP")  # type: ignore[union-attr]
        if not waiting:
            fill(bucket)
        waiting.append(torch.cat([fold_share(entry)["residual"] for entry in store.state_dict(model).values()]))
    assert waiting[0].any()
    assert all(torch.equal(later, waiting[0]) for later in waiting)


def test_a_threshold_does_not_outlive_its_density() -> None:
    store, model = StateStore(), make_model(1000, 300)
    bucket = fill(store.bucket(list(model.values()), state_spec([1000, 300])))
    before = {name: tensor.clone() for name, tensor in bucket.tensors.items()}
    for density, kept in ((0.25, True), (0.25, True), (0.05, False)):
        bucket.follow([density] * 2)
        assert torch.equal(bucket.tensors["threshold"], before["threshold"]) is kept
        assert torch.equal(bucket.tensors["counters"], before["counters"]) is kept
    assert bucket.tensors["threshold"].isinf().all()
    assert not bucket.tensors["counters"].any()
    assert torch.equal(bucket.tensors["residual"], before["residual"])


def counted(number: int, ranks: int = 1, rank: int = 0, compressed: bool = True) -> StateDict:
    """The state of a rank after ``number`` exchanges of two parameters, the first of which may be compressed."""
    store, model = StateStore(), make_model(1000, 300)
    parameters = list(model.values())
    if compressed:
        fill(store.bucket(parameters[:1], state_spec([1000])), rank)
    for _ in range(number):
        count_exchange(store.use.of(parameters))
    file = io.BytesIO()
    torch.save(StateDict(store.state_dict(model), rank, ranks), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense phase", "compressed"])
def test_the_number_is_saved_and_loaded(compressed: bool) -> None:
    model = make_model(1000, 300)
    dct_compile.load_state_dict(model, counted(7, compressed=compressed))
    assert exchanges_of(RUNTIME.states.use.of(model.values())) == 7
    found = dct_compile.state_dict(model)
    assert {name: entry["exchanges"] for name, entry in found.items()} == {"p0": 7, "p1": 7}
    assert ("residual" in found["p0"]) is compressed


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 3)])
@pytest.mark.parametrize("compressed", [False, True], ids=["dense phase", "compressed"])
def test_every_rank_of_another_number_of_ranks_gets_the_number(compressed: bool, saved: int, loaded: int) -> None:
    states = [counted(7, saved, rank, compressed) for rank in range(saved)]
    for rank in range(loaded):
        found = state_for(states, rank, loaded)
        assert [found[name]["exchanges"] for name in ("p0", "p1")] == [7, 7]


def test_ranks_of_different_steps_cannot_be_added_up() -> None:
    with pytest.raises(ValueError, match="the states of p0 were saved after 7 and 8 exchanges"):
        state_for([counted(7, 2, 0), counted(8, 2, 1)], 0, 1)


def test_a_state_without_numbers_is_past_all_phases_and_an_empty_one_before_them() -> None:
    model = make_model(1000, 300)
    plain = {name: {key: value for key, value in entry.items() if key != "exchanges"} for name, entry in counted(7).items()}
    dct_compile.load_state_dict(model, {"p0": plain["p0"]})
    assert exchanges_of(RUNTIME.states.use.of(model.values())) == PAST_ALL
    assert dct_compile.state_dict(model).keys() == {"p0"}
    dct_compile.load_state_dict(model, {})
    assert exchanges_of(RUNTIME.states.use.of(model.values())) == 0


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [("exchanges", -1, "an integer >= 0"), ("exchanges", True, "an integer >= 0"), ("exchanges", "7", "an integer >= 0")]
    + [("density", value, r"a float in \(0, 1\]") for value in (0.0, 2.0, 1, None)],
)
def test_damaged_numbers_are_refused(key: str, value: Any, allowed: str) -> None:
    saved = counted(7)
    saved["p0"][key] = value
    with pytest.raises(ValueError, match=f"the state of p0: {key} must be {allowed}, not"):
        dct_compile.load_state_dict(make_model(1000, 300), saved)


@pytest.mark.parametrize("discarded", [True, False])
def test_a_gradient_that_is_discarded_after_its_state_has_moved_leaves_it(discarded: bool) -> None:
    store, model = StateStore(), make_model(1000, 300)
    parameters = list(model.values())
    specs = [decide(make_gradient(1000, 300), gradient_scheme="random_k", dp_density=density).offer.state for density in (0.25, 0.1)]  # type: ignore[union-attr]
    first = fill(store.bucket(parameters, specs[0], "DDP"))
    before = first.tensors["residual"].clone()
    optimizer = torch.optim.SGD(parameters)
    for spec in specs:  # the second exchange adds to gradients that wait for the optimizer
        bucket = store.bucket(parameters, spec, "DDP")
        store.use.look(parameters)
        bucket.pending.begin(keep=True)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        bucket.tensors["residual"] += 1
    moved = store.bucket(parameters, specs[1], "DDP")
    if not discarded:
        optimizer.step()
    optimizer.zero_grad()
    store.use.look(parameters)
    moved.pending.settle()
    assert torch.equal(moved.tensors["residual"], before if discarded else before + 1 + 1)
