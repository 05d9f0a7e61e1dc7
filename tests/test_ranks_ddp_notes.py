"""Notes and errors about DDP modules: no graph inside, options that differ, gradients averaged twice, hooks of torch's own."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks_ddp import Net, Options, batch, ddp_of, loss_of, train

pytestmark = pytest.mark.distributed


def not_reached(rank: int, world_size: int) -> list[str]:
    models = [ddp_of(net, {}, inside=False)[1] for net in (Net(), nn.Sequential(nn.Linear(16, 64), nn.ReLU()))]
    for step in range(3):
        for model in models:
            loss_of(model(batch(rank, step))).backward()
    return list(dct_compile.report().notes)


def test_a_module_that_no_graph_runs_in_is_named(ranks2: Ranks) -> None:
    for notes in ranks2(not_reached):
        assert [note.partition(",")[0] for note in notes] == ["no graph of backend 'dct' runs inside of DDP(Sequential)"]


class Halves(nn.Module):
    """Two halves with options of their own."""

    def __init__(self, *options: Options) -> None:
        super().__init__()
        halves = [nn.Linear(16, 64), nn.Linear(64, 64)]
        self.bottom, self.top = (torch.compile(half, backend=dct, options=given) for half, given in zip(halves, options, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.bottom(x))


def with_options(rank: int, world_size: int, first: Options, other: Options) -> tuple[list[str], list[str]]:
    module = DistributedDataParallel(Halves(first, other))
    for step in range(2):
        loss_of(module(batch(rank, step))).backward()
    report = dct_compile.report()
    return [site.reason for site in report.sites], list(report.notes)


@pytest.mark.parametrize(
    ("first", "other", "differences"),
    [
        (
            {"dp_density": 0.02},
            {"dp_density": 0.05},
            "option 'dp_density' is 0.02 there and 0.05 in another graph",
        ),
        ({"mp_density": 0.02}, {"mp_density": 0.05}, ""),
    ],
)
def test_the_options_of_the_first_graph_hold(ranks2: Ranks, first: Options, other: Options, differences: str) -> None:
    for (reason,), notes in ranks2(with_options, first, other):
        assert reason.startswith(f"gather, density {first.get('dp_density', 0.01)}; dense: ")
        assert len(notes) == bool(differences)
        assert all(note.startswith("the gradients of Halves travel by the options of the first graph") for note in notes)
        assert all(note.endswith(f"its DDP: {differences}") for note in notes)


def averaged_twice(rank: int, world_size: int) -> str:
    net = Net()
    compiled: Any = torch.compile(net, backend=dct, options={"data_parallel": True})
    loss_of(compiled(batch(rank, 0))).backward()
    try:
        DistributedDataParallel(compiled)(batch(rank, 1))
    except ValueError as error:
        return str(error)
    return ""


def test_gradients_that_would_be_averaged_twice_are_an_error(ranks2: Ranks) -> None:
    assert all("gradients would be averaged twice" in message for message in ranks2(averaged_twice))


def hooked(rank: int, world_size: int) -> list[str]:
    module, compiled = ddp_of(Net(), {}, inside=False)
    module._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    train(module, compiled, rank, range(2))
    return [site.reason for site in dct_compile.report().sites]


def test_a_hook_of_torchs_own_stays_in_place(ranks2: Ranks) -> None:
    assert ranks2(hooked) == [["DDP has a communication hook of its own"]] * 2


class Deep(nn.Module):
    """Four layers of a MiB each: DDP has a bucket for the last one, and one for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def notes_on(rank: int, world_size: int, options: Options, settings: dict[str, Any]) -> list[list[str]]:
    """Returns the notes of the preview, and those of a training."""
    module = DistributedDataParallel(Deep(), **settings)
    x = torch.randn(4, 512)
    preview = dct_compile.explain(module, x, options=options)
    notes = [list(preview.notes)]
    dct_compile.reset_report()
    torch.compile(module, backend=dct, options=options)(x).sum().backward()
    return [*notes, list(dct_compile.report().notes)]


@pytest.mark.parametrize(
    ("options", "settings", "wanted"),
    [
        ({"link": "1Mbit/s"}, {}, True),
        pytest.param({"link": "1Mbit/s"}, {"bucket_cap_mb": 1}, False, id="small buckets"),
        pytest.param({"link": "1Mbit/s", "arrival": "late"}, {}, False, id="no step waits"),
        pytest.param({"link": "1Gbit/s"}, {}, False, id="nothing to hide"),
        pytest.param({"link": None}, {}, False, id="no link known"),
    ],
)
def test_a_bucket_that_no_backward_hides_is_named(ranks2: Ranks, options: Options, settings: dict[str, Any], wanted: bool) -> None:
    for both in ranks2(notes_on, options, settings):
        for notes in both:
            assert len(notes) == wanted
            for note in notes:
                assert note.startswith("DDP(Deep) sends 75% of its bytes when the backward has ended.")
                assert "bucket_cap_mb=1)" in note
