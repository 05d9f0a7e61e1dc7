"""Trainings on two ranks that begin dense, and then send ever less: under DDP in both wrapping orders, and under data_parallel."""

import io
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim import Adam

import dct_compile
from tests.audited_models import Net
from tests.audited_trainings import Setting, loss_of
from tests.rank_pool import Ranks
from tests.ranks import digest

pytestmark = pytest.mark.distributed

WAYS = ["inside", "outside", "data_parallel"]
DENSITY, BETA1, STEPS = 0.05, 0.9, 6
PLAIN = {"dp_density": DENSITY, "dp_value_dtype": "float32", "gradient_scheme": "gather"}
SCHEDULE = {"start_iter": 2, "density_warmup": {0: 0.25, 2: DENSITY}}


class Training:
    """A model in training, with its optimizer."""

    def __init__(self, rank: int, wrapping: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.net, self.setting = Net(), Setting(rank, wrapping, options)
        self.trainee = self.setting.wrap(self.net)
        self.optimizer = Adam(self.net.parameters(), lr=0.01, betas=(BETA1, 0.99))

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.trainee.call(self.setting.batch(step))).backward()
        self.optimizer.step()

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save((self.net.state_dict(), self.optimizer.state_dict(), dct_compile.state_dict(self.net)), file)
        return file.getvalue()

    def load(self, saved: bytes) -> "Training":
        model, optimizer, compressor = torch.load(io.BytesIO(saved), weights_only=True)
        self.net.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        dct_compile.load_state_dict(self.net, compressor)
        return self

    def to_the_end(self, first: int) -> str:
        for step in range(first, STEPS):
            self.step(step)
        residuals = [entry["residual"] for entry in dct_compile.state_dict(self.net).values() if "residual" in entry]
        return digest([*self.net.parameters(), *residuals])

    def is_bypassed(self, step: int) -> bool:
        weight = self.net.a.weight
        assert weight.grad is not None
        return torch.allclose(self.optimizer.state[weight]["exp_avg"], weight.grad * (1 - BETA1 ** (step + 1)), rtol=1e-5, atol=1e-9)


class Course(NamedTuple):
    """By step: ``rows`` of the report, ``wire`` bytes, ``densities`` that the monitor measured, ``bypassed`` first moments.

    Digests at the end: ``whole`` without a break, ``restored`` in place from before each step but the first, ``resumed`` by another model
    from the dense phase, ``plain`` without a schedule from before the last phase.
    """

    rows: list[list[str]]
    wire: list[int]
    densities: list[float | None]
    bypassed: list[bool]
    dense_bytes: int
    whole: str
    restored: list[str]
    resumed: str
    plain: str
    plain_wire: int


def course(rank: int, world_size: int, wrapping: str) -> Course:
    training = Training(rank, wrapping, {**PLAIN, **SCHEDULE})
    saved, rows, wire, densities, bypassed = [], [], [], [], []
    with dct_compile.audit(training.net) as audit, dct_compile.monitor(every=1) as monitor:
        for step in range(STEPS):
            saved.append(training.save())
            training.step(step)
            audit.check()
            monitor.step()
            report = dct_compile.report()
            rows.append([site.reason for site in report.sites])
            wire.append(report.wire_bytes)
            densities.append(monitor.summary().get("density"))
            bypassed.append(training.is_bypassed(step))
    whole = training.to_the_end(STEPS)
    restored = [training.load(saved[first]).to_the_end(first) for first in range(1, STEPS)]
    resumed = Training(rank, wrapping, {**PLAIN, **SCHEDULE}).load(saved[1]).to_the_end(1)
    dct_compile.reset_report()
    plain = Training(rank, wrapping, PLAIN).load(saved[4]).to_the_end(4)
    plain_wire = dct_compile.report().wire_bytes
    return Course(rows, wire, densities, bypassed, report.dense_bytes, whole, restored, resumed, plain, plain_wire)


@pytest.mark.parametrize("wrapping", WAYS)
def test_the_report_shows_the_phase_that_runs(ranks2_once: Ranks, wrapping: str) -> None:
    for found in ranks2_once(course, wrapping):
        assert [len(rows) for rows in found.rows] == [1] * STEPS
        rows = [re.sub(r"; dense: [^;]*", "", row) for (row,) in found.rows]
        dense = "dense until exchange 2, as start_iter or density_warmup asks"
        assert rows == [dense] * 2 + ["gather, density 0.25; until exchange 4"] * 2 + ["gather, density 0.05"] * 2


@pytest.mark.parametrize("wrapping", WAYS)
def test_every_phase_sends_its_own_bytes(ranks2_once: Ranks, wrapping: str) -> None:
    for found in ranks2_once(course, wrapping):
        assert found.wire[::2] == found.wire[1::2]
        dense, middle, last = found.wire[::2]
        assert dense == found.dense_bytes > 2.5 * middle > 7 * last
        assert last == found.plain_wire


@pytest.mark.parametrize("wrapping", WAYS)
def test_the_monitor_measures_the_density_of_the_phase(ranks2_once: Ranks, wrapping: str) -> None:
    for found in ranks2_once(course, wrapping):
        assert found.densities == [None] * 2 + [pytest.approx(0.25, abs=0.03)] * 2 + [pytest.approx(DENSITY, abs=0.006)] * 2


@pytest.mark.parametrize("wrapping", WAYS)
def test_first_moments_are_bypassed_from_a_density_of_a_tenth_on(ranks2_once: Ranks, wrapping: str) -> None:
    for found in ranks2_once(course, wrapping):
        assert found.bypassed[1:] == [False] * 3 + [True] * 2  # at the first step a mean is a multiple of the gradient, too


@pytest.mark.parametrize("wrapping", WAYS)
def test_a_run_that_is_taken_up_in_any_phase_repeats_the_other_one(ranks2_once: Ranks, wrapping: str) -> None:
    for found in ranks2_once(course, wrapping):
        assert found.restored == [found.whole] * (STEPS - 1)
        assert found.resumed == found.whole


@pytest.mark.parametrize("wrapping", WAYS)
def test_the_last_phase_is_a_training_without_phases(ranks2_once: Ranks, wrapping: str) -> None:
    for found in ranks2_once(course, wrapping):
        assert found.plain == found.whole


def accumulated(rank: int, world_size: int, wrapping: str, scheme: str) -> tuple[int, list[str]]:
    """Exchanges twice per step: phases change within a step, within a discarded one and after it."""
    options = {**PLAIN, "gradient_scheme": scheme, "start_iter": 1, "density_warmup": {0: 0.25, 2: 0.1, 5: DENSITY}}
    training = Training(rank, wrapping, options)
    with dct_compile.audit(training.net) as audit:
        for step in range(5):
            training.optimizer.zero_grad()
            for part in range(2):
                loss_of(training.trainee.call(training.setting.batch(10 * step + part))).backward()
            if step not in (1, 2):  # a phase begins within the one, and behind the other
                training.optimizer.step()
            audit.check()
    return dct_compile.state_dict(training.net)["a.weight"]["exchanges"], [site.reason for site in dct_compile.report().sites]


@pytest.mark.parametrize(("wrapping", "scheme"), [("inside", "random_k"), ("inside", "owner"), ("data_parallel", "random_k")])
def test_nothing_is_lost_where_phases_change_within_a_step(ranks2: Ranks, wrapping: str, scheme: str) -> None:
    for exchanges, reasons in ranks2(accumulated, wrapping, scheme):
        assert exchanges == 10
        assert [reason.partition(";")[0] for reason in reasons] == [f"{scheme}, density 0.05"]


def differing(rank: int, world_size: int, wrapping: str, loads: tuple[int | None, int | None], first: bool) -> str:
    """Lets each rank load its state of another step, ``None`` for none, before the first exchange or later. Returns the error."""
    training = Training(rank, wrapping, {**PLAIN, **SCHEDULE})
    saved = []
    for step in range(0 if first else 4):
        saved.append(training.save())
        training.step(step)
    if first:
        numbers = {name: {"exchanges": loads[rank]} for name, _ in training.net.named_parameters()}
        dct_compile.load_state_dict(training.net, {} if loads[rank] is None else numbers)
    else:
        training.load(saved[loads[rank]])  # type: ignore[index]
    try:
        training.step(0)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("wrapping", ["inside", "data_parallel"])
@pytest.mark.parametrize(
    ("loads", "first", "named"),
    [((1, 3), False, ("'1' on rank 0", "'3' on rank 1")), ((None, 3), True, ("'0' on rank 0", "'3' on rank 1"))],
    ids=["later", "first"],
)
def test_ranks_that_load_states_of_different_steps_stop(ranks2: Ranks, wrapping: str, loads: Any, first: bool, named: Any) -> None:
    for error in ranks2(differing, wrapping, loads, first):
        assert "(exchanges of 4 parameters so far), is " in error
        assert all(part in error for part in named)
