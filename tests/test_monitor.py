"""``dct_compile.monitor``: what it reads, when, and what TensorBoard shows of it; on gloo ranks for DDP and for compiled graphs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import dct_compile
from dct_compile.backend import dct
from dct_compile.labels import site_label
from dct_compile.measure import BucketMeasure
from dct_compile.monitor import Monitor, SiteStats
from dct_compile.report import GraphReport, SiteReport
from dct_compile.runtime import Runtime
from dct_compile.state import BucketState
from dct_compile.triton_kernels.layout import GradientLayout
from tests.ranks import fresh_compiler, run_ranks
from tests.ranks_ddp import Net, batch, ddp_of, loss_of
from tests.test_ranks_inspection import Exchanging

GRADIENT = SiteReport("all_reduce", "gradient", "top.weight, top.bias", (400,), "float32", "compressed", "gather", 1600, 40, "0", 2)
EXCHANGE = SiteReport(
    "all_to_all_single", "activation", "top: m.py:3 in f: exchange(x)", (4, 64), "float32", "compressed", "mask", 512, 24, "0", 2, 0.05
)


def bucket_of(*numels: int, owner: bool = False) -> BucketState:
    segments = tuple((sum(numels[:index]), numel) for index, numel in enumerate(numels))
    layout = GradientLayout(segments, 256, 2 if owner else 1, -1, 0.5, torch.float32)
    owned = GradientLayout(segments, 256, 2, 0, 0.5, torch.float32) if owner else None
    return BucketState([], layout, owned, torch.device("cpu"))


def run(bucket: BucketState, steps: int, kept: int, overflow: int = 0) -> None:
    """As if every parameter of ``bucket`` had been sent ``steps`` times, ``kept`` entries each time."""
    bucket.local.counters += torch.tensor([steps, steps * kept, steps * overflow, 0])


def monitored(every: int, *sites: tuple[SiteReport, BucketMeasure | None]) -> tuple[Monitor, Runtime]:
    runtime = Runtime()
    runtime.reports.add(GraphReport("graph 0/0", "", ""), sites)
    return Monitor(every, runtime), runtime


def test_numbers_are_those_since_the_reading_before() -> None:
    bucket = bucket_of(100, 300)
    monitor, _ = monitored(3, (GRADIENT, BucketMeasure([bucket])), (EXCHANGE, None))
    bucket.local.threshold[:] = torch.tensor([1.0, 2.0])
    bucket.local.residual[:2] = torch.tensor([3.0, -4.0])
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
    assert bucket.owner is not None
    run(bucket, steps=1, kept=10, overflow=2)
    bucket.local.residual[0], bucket.owner.residual[0], bucket.owner.counters[0, 2] = 3.0, 4.0, 5
    monitor, _ = monitored(1, (GRADIENT, BucketMeasure([bucket])))
    monitor.step()
    assert (monitor.sites[0].overflow, monitor.sites[0].residual_norm) == (7, 5.0)


def test_a_state_that_was_reset_counts_from_its_start() -> None:
    bucket = bucket_of(400)
    monitor, _ = monitored(1, (GRADIENT, BucketMeasure([bucket])))
    run(bucket, steps=9, kept=4)
    monitor.step()
    bucket.local.counters.zero_()
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
    bucket.local.threshold[:] = 0.5
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


def watch(step: Any, rank: int) -> tuple[tuple[SiteStats, ...], list[bool], dict[str, float]]:
    with dct_compile.monitor(every=4) as monitor:
        news = []
        for number in range(8):
            step(batch(rank, number))
            news.append(monitor.step())
        return monitor.sites, news, monitor.summary()


def trained(rank: int, world_size: int) -> list[Any]:
    results = []
    with fresh_compiler():
        model: nn.Module = Exchanging()
        compiled = torch.compile(model, backend=dct, options={"data_parallel": True, "dp_density": 0.05})
        results.append(watch(lambda x: loss_of(compiled(x)).backward(), rank))
    with fresh_compiler():
        _, around = ddp_of(Net(), {"dp_density": 0.05}, inside=False)
        results.append(watch(lambda x: loss_of(around(x)).backward(), rank))
    return results


@pytest.mark.distributed
def test_compiled_graphs_and_ddps_buckets_are_watched() -> None:
    for results in run_ranks(trained, 2):
        for sites, news, summary in results:
            assert news == [False, False, False, True] * 2
            (gradient,) = (site for site in sites if site.kind == "gradient")
            assert gradient.steps == 4
            assert gradient.density == pytest.approx(0.05, rel=0.15)
            assert gradient.residual_norm is not None
            assert gradient.residual_norm > 0
            assert 0 < (gradient.threshold or 0) < float("inf")
            assert gradient.bytes_sent == 4 * gradient.wire_bytes
            assert summary["density"] == gradient.density
            assert summary["compression"] > 1
        exchanges = [site for site in results[0][0] if site.kind != "gradient"]
        assert [(site.kind, site.dense_bytes, site.wire_bytes, site.density) for site in exchanges] == [
            ("activation", 1024, 48, None),
            ("activation_gradient", 1024, 32, None),
        ]
