"""Notes on all that Dynamo leaves out of graphs: graph breaks, collectives outside, torch's own containers inside of DDP."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Reason
from dct_compile.report import GRADIENTS_OUTSIDE, NOTHING_COMPILED
from tests.rank_pool import Ranks
from tests.ranks import fresh_compiler
from tests.ranks_ddp import Part, ddp_of
from tests.tracing import fake_group


class Two(nn.Module):
    """Two linear layers and what happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.bottom, self.top, self.between = nn.Linear(16, 64), nn.Linear(64, 16), between

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.between(torch.relu(self.bottom(x))))


def broken(h: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return funcol.all_to_all_single_autograd(h, None, None, dist.group.WORLD)


@torch.compiler.disable
def outside(h: Tensor) -> Tensor:
    return funcol.all_to_all_single_autograd(h, None, None, dist.group.WORLD)


def asynchronous(h: Tensor) -> Tensor:
    received = torch.empty_like(h)
    work = dist.all_to_all_single(received, h, async_op=True)
    assert work is not None
    work.wait()
    return received


def unbroken(h: Tensor) -> Tensor:
    return h.sin()


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (broken, ["test_ranks_outside.py", "in broken: torch._dynamo.graph_break()", "Call to `torch._dynamo.graph_break()`", "fullgraph"]),
        (outside, ["in forward: return self.top(self.between", "Skip calling `torch.compiler.disable()`d function", "are not seen"]),
        (asynchronous, ["in asynchronous: work = dist.all_to_all_single", "async_op=True", "functional_collectives"]),
        (unbroken, []),
    ],
)
def test_a_graph_break_is_told_once(between: Callable[[Tensor], Tensor], words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with fake_group(2), fresh_compiler():
        compiled = torch.compile(Two(between), backend=dct, options={"mp_density": 1})
        for _ in range(2):
            compiled(torch.randn(8, 16))
        report = dct_compile.report()
    warned = [record.getMessage() for record in caplog.records if record.name == "dct_compile" and record.levelno == logging.WARNING]
    assert list(report.notes) == [*warned, GRADIENTS_OUTSIDE]  # nobody averages them here
    assert len(warned) == bool(words)
    for word in words:
        assert word in warned[0]
    if between is broken:
        assert [site.reason for site in report.sites] == [Reason.RETURNED, Reason.DENSE_FORWARD.format(reason=Reason.RETURNED)]


@pytest.mark.parametrize(("options", "ranks", "told"), [({}, 2, True), ({}, 1, False), ({"data_parallel": True}, 2, False)])
def test_gradients_that_no_graph_reduces_are_told(options: dict[str, Any], ranks: int, told: bool) -> None:
    """A training loop that averages them itself would go on sending everything."""
    with fake_group(ranks), fresh_compiler():
        compiled = torch.compile(Part(nn.Linear(16, 16)), backend=dct, options=options)
        compiled(torch.randn(8, 16)).sum().backward()
        assert (GRADIENTS_OUTSIDE in dct_compile.report().notes) == told
        with torch.no_grad():
            dct_compile.reset_report()
            compiled(torch.randn(4, 16))
            assert GRADIENTS_OUTSIDE not in dct_compile.report().notes


CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
    "linear": lambda: nn.Linear(16, 16),
    "partly": lambda: nn.Sequential(nn.Linear(16, 16), Part(nn.Linear(16, 16))),
    "own class": lambda: Two(unbroken),
}


def notes_of(rank: int, world_size: int, name: str, inside: bool) -> list[str]:
    """Returns the notes after two steps under DDP, compiled from inside of it or from outside."""
    _, compiled = ddp_of(CONTAINERS[name](), {}, inside)
    for _ in range(2):
        compiled(torch.randn(8, 16)).square().mean().backward()
    return list(dct_compile.report().notes)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["sequential", "linear"])
def test_containers_that_torch_skips_are_told(ranks2: Ranks, name: str) -> None:
    """A backend that is never called can only be asked afterwards."""
    assert ranks2(notes_of, name, False) == [[NOTHING_COMPILED]] * 2


@pytest.mark.distributed
def test_parts_that_torch_skips_are_named(ranks2: Ranks) -> None:
    for (note,) in ranks2(notes_of, "partly", False):
        assert note.startswith("parts of DDP's model run outside of compiled graphs: 0.weight, 0.bias. ")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "inside"), [("own class", False), ("partly", True)])
def test_what_is_compiled_as_a_whole_needs_no_note(ranks2: Ranks, name: str, inside: bool) -> None:
    assert ranks2(notes_of, name, inside) == [[], []]
