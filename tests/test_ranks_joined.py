"""The messages of DDP's buckets are joined: a step sends fewer of them, with the same bytes and the same results."""

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import dct_compile
from dct_compile.bench.sockets import sent_bytes
from dct_compile.comm import Comm
from dct_compile.integrations import ddp_reducer
from dct_compile.integrations.ddp_join import send
from dct_compile.integrations.suspended import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Request
from dct_compile.runtime import RUNTIME
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_ddp import Net, Options, batch, ddp_of, loss_of

pytestmark = pytest.mark.distributed
STEPS = 5
SINGLE_BUCKETS = 0.00001
"""MB: each of the eight parameters has a bucket of its own."""
FRAMING = 300
"""Bytes that gloo's headers may take for a message of two ranks."""


@dataclass(frozen=True)
class Training:
    """``joined``, ``alone``: the collectives of a step, with and without joining. ``limit``: buckets are joined up to that many bytes."""

    joined: list[str]
    alone: list[str]
    options: Options = field(default_factory=dict)
    unused: bool = False
    static: bool = False
    limit: int = 64 * 1024


AG, A2A, AR = "all_gather", "all_to_all", "all_reduce"
TRAININGS = {
    "gather": Training([AG], [AG] * 8, {"gradient_scheme": "gather"}),
    "owner": Training([A2A, AG], [A2A, AG] * 8, {"gradient_scheme": "owner"}),
    "random_k": Training([AR], [AR] * 8, {"gradient_scheme": "random_k"}),
    "powersgd": Training([AR] * 4 + [AR] * 2, [AR] * 4 + [AR] * 8, {"gradient_scheme": "powersgd"}),  # four biases stay dense
    "dense buckets": Training([AR, AR, AG], [AR, AR] + [AG] * 6, {"gradient_scheme": "gather", "exempt": ["top.*"]}),
    "unused": Training([AG], [AG] * 8, unused=True),
    "static": Training([AG], [AG] * 8, {"gradient_scheme": "gather"}, static=True),
    "phases": Training([AG], [AG] * 8, {"gradient_scheme": "gather", "start_iter": 1, "density_warmup": 1}),
    "a limit": Training([AG, AG], [AG] * 8, {"gradient_scheme": "gather"}, limit=400),
}


def train(training: Training, rank: int, limit: int) -> tuple[list[str], list[str], int]:
    """Trains. Returns a digest per step, the collectives of the last step, and the bytes that it has sent."""
    started: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(Comm, name)

        def start(comm: Comm, x: Tensor, *arguments: Any) -> Tensor:
            if not isinstance(x, FakeTensor):
                started.append(name)
            return original(comm, x, *arguments)

        return patch.object(Comm, name, start)

    settings = {"bucket_cap_mb": SINGLE_BUCKETS, "find_unused_parameters": training.unused, "static_graph": training.static}
    options = {"dp_density": 0.05, "min_numel": 1, **training.options}
    sent, digests = 0, []
    with torch._dynamo.config.patch(optimize_ddp=False), patch.object(ddp_reducer, "join_bytes", lambda link, ranks: limit):
        module, compiled = ddp_of(Net(), options, training.unused, **settings)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        with counting(AG), counting(A2A), counting(AR):
            for step in range(STEPS):
                started.clear()
                dist.barrier()
                before = sent_bytes()
                arguments = (step % 2 == 0 or rank == 0,) if training.unused else ()
                loss_of(compiled(batch(rank, step), *arguments)).backward()
                sent = sent_bytes() - before
                optimizer.step()
                optimizer.zero_grad()
                digests.append(digest(module.parameters()))
    return digests, list(started), sent


def joined_and_alone(rank: int, world_size: int, name: str) -> Any:
    training = TRAININGS[name]
    alone = train(training, rank, 0)
    torch._dynamo.reset()
    dct_compile.reset_report()
    return train(training, rank, training.limit), alone, dct_compile.report().wire_bytes


def check(results: list[Any], training: Training) -> None:
    for (digests, started, _), (digests_alone, started_alone, _), _ in results:
        assert started == training.joined
        assert sorted(started_alone) == sorted(training.alone)
        assert digests == results[0][0][0], "the ranks differ"
        assert digests == digests_alone


@pytest.mark.parametrize("name", TRAININGS)
def test_joined_messages_change_no_value(ranks2_once: Ranks, name: str) -> None:
    check(ranks2_once(joined_and_alone, name), TRAININGS[name])


@pytest.mark.parametrize("name", ["gather", "owner"])
def test_three_ranks_join_alike(ranks3: Ranks, name: str) -> None:
    check(ranks3(joined_and_alone, name), TRAININGS[name])


@pytest.mark.parametrize("name", ["gather", "owner"])
def test_joined_messages_send_what_the_report_says(ranks2_once: Ranks, name: str) -> None:
    for (_, started, sent), (_, _, sent_alone), reported in ranks2_once(joined_and_alone, name):
        assert reported <= sent <= reported + FRAMING * len(started) < sent_alone


def requests_of(rank: int) -> list[Request]:
    generator = torch.Generator().manual_seed(rank)
    numbers = [torch.randint(0, 255, (numel,), dtype=torch.uint8, generator=generator) for numel in (12, 30, 6, 18, 7)]
    floats = [torch.randn(shape, generator=generator) for shape in ((3, 5), (4,), (6, 2))]
    return [
        Request(ALL_GATHER, numbers[0]),
        Request(ALL_TO_ALL, numbers[1]),
        Request(ALL_REDUCE, floats[0], "avg"),
        Request(ALL_TO_ALL, numbers[2]),
        Request(ALL_GATHER, floats[1]),
        Request(ALL_GATHER, numbers[3].view(9, 2)),
        Request(ALL_REDUCE, floats[1], "sum"),
        Request(ALL_REDUCE, floats[2], "avg"),
        Request(ALL_TO_ALL, floats[2]),
        Request(ALL_GATHER, numbers[4]),
    ]


def sent_together(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    assert dist.group.WORLD is not None
    comm = Comm(dist.group.WORLD.group_name, world_size)
    together, apart = send(requests_of(rank), comm), [send([request], comm)[0] for request in requests_of(rank)]
    return together, apart


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_collective_is_divided_as_it_was_joined(ranks: int, request: pytest.FixtureRequest) -> None:
    for together, apart in request.getfixturevalue(f"ranks{ranks}")(sent_together):
        for one, other in zip(together, apart, strict=True):
            torch.testing.assert_close(one, other)  # a ring adds up an element in an order that depends on its place
            assert one.is_contiguous()


def failing(rank: int, world_size: int) -> tuple[str, int]:
    """Lets the third bucket of a step fail. Returns the error of the backward, and the collectives of that step."""
    with torch._dynamo.config.patch(optimize_ddp=False):
        _module, compiled = ddp_of(Net(), {"dp_density": 0.05, "min_numel": 1}, False, bucket_cap_mb=SINGLE_BUCKETS)
        for step in range(2):
            loss_of(compiled(batch(rank, step))).backward()
        calls, started, begin = [], [], RUNTIME.begin_exchange

        def fail(*arguments: Any, **settings: Any) -> None:
            calls.append(arguments)
            if len(calls) == 3:
                raise RuntimeError("the third bucket fails")
            begin(*arguments, **settings)

        def start(comm: Comm, x: Tensor) -> Tensor:
            started.append(x)
            raise AssertionError("nothing may be sent")

        loss = loss_of(compiled(batch(rank, 2)))
        with patch.object(RUNTIME, "begin_exchange", fail), patch.object(Comm, "all_gather", start), pytest.raises(RuntimeError) as error:
            loss.backward()
    return str(error.value), len(calls) + len(started)


def test_an_error_reaches_the_backward_and_nothing_more_is_sent(ranks2: Ranks) -> None:
    for message, count in ranks2(failing):
        assert "the third bucket fails" in message
        assert count == 3
