"""A function stops at its collectives, and goes on with the results that it is sent."""

from functools import partial

import pytest
import torch
from torch import Tensor

from dct_compile.comm import Comm, Steps, finish
from dct_compile.integrations.ddp_join import join_bytes
from dct_compile.integrations.suspended import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, suspended
from dct_compile.link import ONE_MACHINE, Link


def two_stages(x: Tensor, y: Tensor, comm: Comm) -> Steps:
    """Starts two collectives, waits for the second one first, and then takes a third one."""
    total = comm.all_reduce(x + 1, "avg")
    gathered = yield comm.all_gather(y)
    chunks = yield comm.all_to_all(gathered * 2)
    mean = yield total
    return chunks.sum() + mean


def test_it_stops_at_waits_with_all_that_was_reached() -> None:
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.ones(4)
    steps = suspended(partial(two_stages, x, y), Comm("", 2))
    first = next(steps)
    assert [(item.collective, item.op, item.x.tolist()) for item in first] == [
        (ALL_REDUCE, "avg", [2.0, 3.0, 4.0]),
        (ALL_GATHER, "", [1.0] * 4),
    ]
    second = steps.send([torch.tensor([10.0, 20.0, 30.0]), torch.arange(8.0)])
    assert [(item.collective, item.x.tolist()) for item in second] == [(ALL_TO_ALL, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0])]
    with pytest.raises(StopIteration) as end:
        steps.send([torch.full((8,), 0.5)])
    assert end.value.value.tolist() == [14.0, 24.0, 34.0]


def test_a_function_without_collectives_runs_to_its_end() -> None:
    def alone(comm: Comm) -> Steps:
        yield from ()
        return torch.ones(2) * 3

    with pytest.raises(StopIteration) as end:
        next(suspended(alone, Comm("", 2)))
    assert end.value.value.tolist() == [3.0, 3.0]


class InstantComm(Comm):
    """Collectives among ranks that all have the same input. ``wait`` adds 1, so that a result that was not waited for is seen."""

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.size)

    def all_to_all(self, x: Tensor) -> Tensor:
        return x

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return x

    def wait(self, x: Tensor) -> Tensor:
        return x + 1


def test_it_can_be_run_to_its_end_at_once() -> None:
    comm = InstantComm("", 2)
    # gathered: four times 2, chunks: 2 * 2 + 1, their sum 20, and the total 1 + 1 + 1.
    assert finish(two_stages(torch.ones(1), torch.ones(2), comm), comm).tolist() == [23.0]


@pytest.mark.parametrize(
    ("link", "ranks", "wanted"),
    [
        (Link(1.25e9), 2, 62500),
        (Link(1.25e9), 8, 437500),
        (Link(12.5e6, 1e-3), 2, 12500),
        (None, 3, 125000),
        (Link(1e9), 1, 0),
        (ONE_MACHINE, 8, 0),
    ],
)
def test_messages_are_joined_up_to_the_bytes_that_take_as_long_as_the_latency(link: Link | None, ranks: int, wanted: int) -> None:
    assert join_bytes(link, ranks) == wanted
