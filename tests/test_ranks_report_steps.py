"""The report's "per rank and step" is what one training step sends, however often graphs are compiled and run."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks_ddp import Exchanging, Net, Part, ddp_of, loss_of

pytestmark = pytest.mark.distributed
OPTIONS = {"data_parallel": True}


class Seen(NamedTuple):
    """``step``: dense bytes and bytes on the wire of a step. ``calls``: of every site. ``lines``: the sums below the table."""

    step: tuple[int, int]
    calls: list[tuple[str, int]]
    lines: list[str]
    compression: float


def seen() -> Seen:
    report = dct_compile.report()
    with dct_compile.monitor(every=1) as monitor:
        monitor.step()
    lines = [line for line in str(report).splitlines() if line.startswith("per rank")]
    return Seen((report.dense_bytes, report.wire_bytes), [(s.kind, s.calls) for s in report.sites], lines, monitor.summary()["compression"])


def compiled(module: nn.Module, **options: Any) -> Any:
    return torch.compile(module, backend=dct, options={**OPTIONS, **options})


def batches(rank: int, world_size: int) -> list[Seen]:
    """Trains with batches of several sizes, which are compiled anew: with a static size, then with a dynamic one."""
    model, steps = compiled(Net()), []
    for size in (16, 16, 24, 40):
        loss_of(model(torch.randn(size, 16))).backward()
        steps.append(seen())
    return steps


def evaluated(rank: int, world_size: int) -> list[Seen]:
    """Trains, evaluates in batches of two sizes, and trains again."""
    model, steps = compiled(Exchanging()), []
    for size, trains in ((16, True), (16, False), (32, False), (16, True)):
        with torch.set_grad_enabled(trains):
            loss = loss_of(model(torch.randn(size, 16)))
        if trains:
            loss.backward()
        steps.append(seen())
    return steps


def layered(rank: int, world_size: int, how: str) -> Seen:
    """Trains a model whose layers are compiled one by one."""
    sizes = [(16, 16)] * 3 if how != "of two shapes" else [(16, 16), (16, 32), (32, 32), (32, 16)]
    layers = [compiled(Part(nn.Linear(*size))) for size in sizes]
    layers = [layers[0]] * 3 if how == "shared" else layers
    for _ in range(2):
        hidden = torch.randn(8, 16)
        for layer in layers:
            hidden = layer(hidden)
        loss_of(hidden).backward()
    return seen()


def several(rank: int, world_size: int, how: str) -> Seen:
    """Trains two models of one class, one after the other."""
    ddp = [ddp_of(Net(width), {}, inside=False)[1] for width in (32, 64)] if how == "in DDP" else []
    models = ddp or [compiled(Net()) for _ in range(2)]
    for _ in range(2):
        for model in models:
            loss_of(model(torch.randn(8, 16))).backward()
    return seen()


def explained(rank: int, world_size: int) -> tuple[int, list[int]]:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Part(nn.Linear(16, 16)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (*self.layers, self.layers[0]):
                torch._dynamo.graph_break()
                x = layer(x)
            return x

    report = dct_compile.explain(Layers(), torch.randn(8, 16), options=OPTIONS)
    return report.dense_bytes, [site.calls for site in report.sites]


NET, WIDE_NET = (4 * sum(parameter.numel() for parameter in Net(width).parameters()) for width in (32, 64))
LINEAR = 4 * (16 * 16 + 16)


def test_a_batch_of_another_size_is_another_compilation_of_the_same_step(ranks2_once: Ranks) -> None:
    for steps in ranks2_once(batches):
        assert {step.step[0] for step in steps} == {NET}, "two ranks: a ring sends the buffer once"
        assert len({step.step[1] for step in steps}) == 1
        assert [step.calls for step in steps] == [[("gradient", 1)]] * 2 + [[("gradient", 0), ("gradient", 1)]] * 2


def test_the_compression_of_a_monitor_is_that_of_a_step(ranks2_once: Ranks) -> None:
    for steps in (*ranks2_once(batches), *ranks2_once(evaluated)):
        assert [step.compression for step in steps] == [pytest.approx(step.step[0] / step.step[1]) for step in steps]


def test_an_evaluation_has_a_line_of_its_own(ranks2_once: Ranks) -> None:
    rows = 64 * 4 // 2  # of which a rank keeps one half
    gradient = 4 * (16 * 64 + 64 + 64 * 64 + 64)
    for trained, small, large, again in ranks2_once(evaluated):
        assert trained.step[0] == gradient + 2 * 16 * rows, "there and back"
        assert trained.step == small.step == large.step == again.step
        assert len(trained.lines) == 1
        assert [line.split(" bytes dense")[0] for line in small.lines] == [
            f"per rank and step: {trained.step[0]}",
            f"per rank and evaluation: {16 * rows}",
        ]
        assert large.lines[1].startswith(f"per rank and evaluation: {32 * rows} bytes dense")
        assert large.lines == again.lines


@pytest.mark.parametrize(
    ("how", "bytes_", "calls"),
    [
        ("alike", 3 * LINEAR, [1, 2]),
        ("shared", 3 * LINEAR, [1, 2]),
        ("of two shapes", 4 * (16 * 16 + 16 * 32 + 32 * 32 + 32 * 16 + 16 + 32 + 32 + 16), [1, 1, 1, 1]),
    ],
)
def test_layers_that_are_compiled_alone_count_as_often_as_they_run(ranks2: Ranks, how: str, bytes_: int, calls: list[int]) -> None:
    """The first layer has a graph of its own: its input needs no gradient."""
    for result in ranks2(layered, how):
        assert (result.step[0], [count for _, count in result.calls]) == (bytes_, calls)


@pytest.mark.parametrize(("how", "bytes_"), [("compiled", 2 * NET), ("in DDP", NET + WIDE_NET)])
def test_two_models_of_one_class_count_both(ranks2: Ranks, how: str, bytes_: int) -> None:
    for result in ranks2(several, how):
        assert result.step[0] == bytes_


def test_explain_counts_the_calls_of_one_step(ranks2: Ranks) -> None:
    for bytes_, calls in ranks2(explained):
        assert (bytes_, calls) == (4 * LINEAR, [1, 3])
