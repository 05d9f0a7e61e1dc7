"""``dct_compile.monitor``: what it reads, when, and what TensorBoard shows of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import dct_compile
from dct_compile.labels import site_label
from dct_compile.measure import BucketMeasure
from dct_compile.monitor import Monitor, SiteStats
from dct_compile.report import GraphReport, SiteReport
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import BucketState
from tests.states import state_spec

GRADIENT = SiteReport("all_reduce", "gradient", "top.weight, top.bias", (400,), "float32", "compressed", "gather", 1600, 40, "0", 2)
EXCHANGE = SiteReport(
    "all_to_all_single", "activation", "top: m.py:3 in f: exchange(x)", (4, 64), "float32", "compressed", "mask", 512, 24, "0", 2, 0.05
)


def bucket_of(*numels: int, owner: bool = False) -> BucketState:
    return BucketState([], state_spec(numels, ranks=2 if owner else 0), torch.device("cpu"))


def run(bucket: BucketState, steps: int, kept: int, overflow: int = 0) -> None:
    """As if every parameter of ``bucket`` had been sent ``steps`` times, ``kept`` entries each time."""
    bucket.tensors["counters"] += torch.tensor([steps, steps * kept, steps * overflow, 0, kept])


def monitored(every: int, *sites: tuple[SiteReport, BucketMeasure | None]) -> tuple[Monitor, Runtime]:
    runtime = Runtime()
    runtime.reports.add(GraphReport("graph 0/0", "", ""), sites)
    return Monitor(every, runtime), runtime


def test_numbers_are_those_since_the_reading_before() -> None:
    bucket = bucket_of(100, 300)
    monitor, _ = monitored(3, (GRADIENT, BucketMeasure([bucket])), (EXCHANGE, None))
    bucket.tensors["threshold"][:] = torch.tensor([1.0, 2.0])
    bucket.tensors["residual"][:2] = torch.tensor([3.0, -4.0])
    with monitor:
        run(bucket, steps=3, kept=2)
        assert [monitor.step() for _ in range(3)] == [False, False, True]
        gradient, exchange = monitor.sites
        assert gradient == SiteStats("top.weight +1", "gradient", "all_reduce", 1600, 40, 3, 12 / 1200, 0, 1.5, 5.0, 120)
        assert exchange == SiteStats("top: m.py:3", "activation", "all_to_all_single", 512, 24)
        assert monitor.summary() == {"density": 0.01, "overflow": 0, "compression": 2112 / 64}
        run(bucket, steps=6, kept=4, overflow=1)
        assert [monitor.step() for _ in range(3)] == [False, False, True]
    gradient = monitor.sites[0]
    assert (gradient.steps, gradient.density, gradient.overflow, gradient.bytes_sent) == (6, 48 / 2400, 12, 240)


def test_nothing_is_known_before_the_first_step() -> None:
    monitor, _ = monitored(1, (GRADIENT, BucketMeasure([bucket_of(400)])))
    assert (monitor.sites, monitor.summary()) == ((), {})
    assert monitor.step()
    assert monitor.sites == (SiteStats("top.weight +1", "gradient", "all_reduce", 1600, 40),)
    assert monitor.summary() == {"compression": 40.0}


def test_owners_overflow_and_residual_count() -> None:
    bucket = bucket_of(1000, owner=True)
    run(bucket, steps=1, kept=10, overflow=2)
    bucket.tensors["residual"][0], bucket.tensors["owner_residual"][0], bucket.tensors["owner_counters"][0, 2] = 3.0, 4.0, 5
    monitor, _ = monitored(1, (GRADIENT, BucketMeasure([bucket])))
    monitor.step()
    assert (monitor.sites[0].overflow, monitor.sites[0].residual_norm) == (7, 5.0)


def test_a_state_that_was_reset_counts_from_its_start() -> None:
    bucket = bucket_of(400)
    monitor, _ = monitored(1, (GRADIENT, BucketMeasure([bucket])))
    run(bucket, steps=9, kept=4)
    monitor.step()
    bucket.tensors["counters"].zero_()
    run(bucket, steps=2, kept=8)
    monitor.step()
    assert (monitor.sites[0].steps, monitor.sites[0].density) == (2, 0.02)


def test_a_site_of_several_graphs_is_one_with_all_their_states() -> None:
    one, other = bucket_of(400), bucket_of(400)
    monitor, runtime = monitored(1, (GRADIENT, BucketMeasure([one])), (EXCHANGE, None), (EXCHANGE, None))
    runtime.reports.add(GraphReport("graph 0/1", "", ""), [(GRADIENT, BucketMeasure([one, other])), (EXCHANGE, None)])
    run(one, steps=1, kept=4)
    run(other, steps=1, kept=8)
    monitor.step()
    gradient, exchange = monitor.sites
    assert (gradient.steps, gradient.density, gradient.dense_bytes) == (2, 12 / 800, 1600)
    assert (exchange.dense_bytes, exchange.wire_bytes) == (1024, 48), "twice in one graph, on one line"


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_a_bad_interval_is_named(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every is {every!r}; allowed is an integer >= 1"):
        dct_compile.monitor(every)


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [
        ("top.weight", "gradient", "top.weight"),
        ("top.weight, top.bias, bottom.weight", "gradient", "top.weight +2"),
        ("m.py:3 in forward: f(a, b)", "gradient", "m.py:3"),
        ("top.0: m.py:3 in forward: f(a, b)", "activation", "top.0: m.py:3"),
        ("m.py:3 in forward: f(a, b)", "embedding_gradient", "m.py:3 backward"),
    ],
)
def test_labels(name: str, kind: str, label: str) -> None:
    assert site_label(name, kind) == label


def test_tensorboard_shows_every_number_once(tmp_path: Path) -> None:
    bucket = bucket_of(400)
    monitor, _ = monitored(2, (GRADIENT, BucketMeasure([bucket])), (EXCHANGE, None))
    bucket.tensors["threshold"][:] = 0.5
    with SummaryWriter(str(tmp_path)) as writer, monitor:
        for step in range(5):
            run(bucket, steps=1, kept=4 * (step + 1))
            monitor.step()
            monitor.write(writer, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    numbers = ("density", "overflow", "threshold", "residual_norm", "bytes_sent", "wire_bytes")
    assert sorted(events.Tags()["scalars"]) == sorted([*(f"dct/top.weight_1/{name}" for name in numbers), "dct/top_m.py_3/wire_bytes"])
    shown = [(event.step, round(event.value, 6)) for event in events.Scalars("dct/top.weight_1/density")]
    assert shown == [(1, 0.015), (3, 0.035)]
    assert [(event.step, event.value) for event in events.Scalars("dct/top.weight_1/bytes_sent")] == [(1, 80.0), (3, 80.0)]
