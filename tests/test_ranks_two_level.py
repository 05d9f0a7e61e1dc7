"""Gradients at two levels over four gloo ranks that count as two hosts: the sum inside a host is dense, hosts exchange payloads."""

import io
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from dct_compile.groups import ranks_per_host
from dct_compile.runtime import RUNTIME
from dct_compile.state.entry import fold_share
from dct_compile.state.store import named_parameters
from tests.audited_trainings import Setting
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_ddp import SMALL_BUCKETS, Net, batch, ddp_of, loss_of, train
from tests.test_ranks_audit import EVERYWHERE, UNDER_DDP

pytestmark = pytest.mark.distributed
HOSTS, PER_HOST = 2, 2
OPTIONS: dict[str, Any] = {"gradient_scheme": "two_level", "ranks_per_host": PER_HOST, "dp_value_dtype": "float32"}
FIXED = {**OPTIONS, "threshold": 0.02, "dp_density": 0.9, "capacity_factor": 1.2}
"""All that reaches .02 is sent."""


def by_the_scheme_and_by_the_reference(rank: int, world_size: int, settings: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Returns the gradient of each compressed parameter in each step, and what the reference makes of the gradients of all ranks."""
    with torch._dynamo.config.patch(optimize_ddp=not settings):
        return compared(rank, world_size, settings)


def compared(rank: int, world_size: int, settings: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    module, compiled = ddp_of(Net(), FIXED, inside=True, **settings)
    alone, found = Net(), []
    waiting: dict[str, list[list[Tensor]]] = {}
    for step in range(4):
        loss_of(compiled(batch(rank, step))).backward()
        for source in range(world_size):
            loss_of(alone(batch(source, step))).backward()
            for name, parameter in alone.named_parameters():
                waiting.setdefault(name, [[] for _ in range(HOSTS)])[source // PER_HOST].append(parameter.grad.flatten())
            alone.zero_grad()
        state = dct_compile.state_dict(module)
        for name, parameter in named_parameters(module):
            if name in state:
                sums = [torch.stack(parts).sum(0) for parts in waiting[name]]
                sent = [torch.where(total.abs() >= FIXED["threshold"], total, 0) for total in sums]
                waiting[name] = [[total - part] for total, part in zip(sums, sent, strict=True)]
                found.append((parameter.grad.flatten(), torch.stack(sent).sum(0) / world_size))
        module.zero_grad()
    return found


@pytest.mark.parametrize("settings", [{}, {"bucket_cap_mb": SMALL_BUCKETS}], ids=["one bucket", "buckets"])
def test_what_arrives_is_what_the_reference_says(ranks4: Ranks, settings: dict[str, Any]) -> None:
    for found in ranks4(by_the_scheme_and_by_the_reference, settings):
        assert len(found) == 4 * 4  # the weights; biases stay dense
        assert any(not expected.all() for _, expected in found)
        for gradient, expected in found:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


CASES = [(name, arrival) for index, name in enumerate(EVERYWHERE | UNDER_DDP) for arrival in (("now", "late")[index % 2],)]


def audited(rank: int, world_size: int, name: str, arrival: str) -> list[tuple[int, int, set[str]]]:
    training, make = (EVERYWHERE | UNDER_DDP)[name]
    torch.manual_seed(0)
    options = {**OPTIONS, "dp_density": 0.02, "arrival": arrival}
    with ExitStack() as stack:
        audits = [stack.enter_context(dct_compile.audit(net)) for net in training(make(), Setting(rank, "inside", options))]
        results = [audit.check() for audit in audits]
    schemes = {site.reason.split(",")[0] for site in dct_compile.report().sites if site.decision == "compressed"}
    return [(result.steps, len(result.compressed), schemes) for result in results]


@pytest.mark.parametrize(("name", "arrival"), CASES)
def test_nothing_is_lost(ranks4: Ranks, name: str, arrival: str) -> None:
    scheme = "gather" if name == "unused parameters" else "two_level"  # only a rank knows what it has left out
    for steps, compressed, schemes in ranks4(audited, name, arrival)[0]:
        assert steps >= 3
        assert compressed >= 1
        assert schemes == {scheme}


def trained(rank: int, world_size: int) -> tuple[list[str], int, int, float]:
    options = {**OPTIONS, "gradient_scheme": "auto", "dp_density": 0.05, "min_numel": 0}
    module, compiled = ddp_of(Net(128), options, inside=False)
    digests = train(module, compiled, rank, range(12))
    (site,) = [site for site in dct_compile.report().sites if site.decision == "compressed"]
    assert site.reason == "two_level, density 0.05; the 2 ranks of a host add up dense"
    return digests, site.wire_bytes, site.offers["gather"], site.density


def test_ranks_stay_equal_and_little_is_sent(ranks4: Ranks) -> None:
    (first, wire, gather, density), *others = ranks4(trained)
    assert all(digests == first for digests, *_ in others)
    assert wire < gather / 3  # one rank of another host in place of three ranks, and half of each parameter
    assert 0.03 < density < 0.07


def resumed(rank: int, world_size: int) -> tuple[str, str]:
    """Trains for four steps; saves, loads and goes on in a second model. Returns the digests of both."""
    options = {**OPTIONS, "min_numel": 0}  # gloo's dense sum over four ranks rounds by an element's place in the bucket
    module, compiled = ddp_of(Net(), options, inside=False)
    train(module, compiled, rank, range(4))
    other, again = loaded(module, options)
    for net, call in ((module, compiled), (other, again)):
        train(net, call, rank, range(4, 6))
    return digest(module.parameters()), digest(other.parameters())


def loaded(module: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Returns a second model, uncompiled and compiled, with the parameters and the state of ``module``."""
    file = io.BytesIO()
    torch.save((module.state_dict(), dct_compile.state_dict(module)), file)
    file.seek(0)
    parameters, state = torch.load(file)
    other, compiled = ddp_of(Net(), options, inside=False)
    other.load_state_dict(parameters)
    dct_compile.load_state_dict(other, state)
    return other, compiled


def test_a_resumed_run_is_the_run_that_was_not_interrupted(ranks4: Ranks) -> None:
    for whole, continued in ranks4(resumed):
        assert whole == continued


def continued(rank: int, world_size: int, first: str, then: str) -> list[tuple[Tensor, Tensor]]:
    """Goes on under another scheme. Returns for each weight: the gradients of all ranks and what waited, what arrived and what waits."""
    module, compiled = ddp_of(Net(), {**OPTIONS, "gradient_scheme": first}, inside=False)
    train(module, compiled, rank, range(4))
    other, again = loaded(module, {**OPTIONS, "gradient_scheme": then})
    alone = Net()
    alone.load_state_dict(other.module.state_dict())
    loss_of(alone(batch(rank, 4))).backward()
    before = waiting_of(other)
    loss_of(again(batch(rank, 4))).backward()
    after = waiting_of(other)
    found = []
    for name, parameter in alone.named_parameters():
        if name in before:
            total = parameter.grad.flatten().double()
            dist.all_reduce(total)
            arrived = dict(named_parameters(other))[name].grad.flatten().double()
            found.append((total + before[name], world_size * arrived + after[name]))
    return found


def waiting_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns the sum over the ranks of what waits for each parameter."""
    sums = {}
    for name, entry in sorted(dct_compile.state_dict(module).items()):
        sums[name] = fold_share(entry)["residual"].double()
        dist.all_reduce(sums[name])
    return sums


@pytest.mark.parametrize(
    ("first", "then"), [(first, then) for one in ("gather", "owner") for first, then in permutations((one, "two_level"))]
)
def test_what_waits_goes_on_under_another_scheme(ranks4: Ranks, first: str, then: str) -> None:
    for found in ranks4(continued, first, then):
        assert len(found) == 4
        for whole, parts in found:
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def hosts_of(rank: int, world_size: int) -> list[int]:
    groups = [dist.new_group(ranks) for ranks in ([0, 1, 2], [0, 2], [0, 1])]
    return [ranks_per_host(group, 2) if rank == 0 else 0 for group in (dist.group.WORLD, *groups)]


def test_ranks_of_a_host_are_those_of_the_group(ranks4: Ranks) -> None:
    assert ranks4(hosts_of)[0] == [2, 1, 1, 2]


def refused(rank: int, world_size: int) -> str:
    module, compiled = ddp_of(Net(), {**OPTIONS, "ranks_per_host": 3}, inside=False)
    try:
        train(module, compiled, rank, range(1))
    except ValueError as error:
        return str(error)
    return ""


def test_a_number_that_does_not_divide_the_ranks_is_an_error(ranks4: Ranks) -> None:
    assert set(ranks4(refused)) == {"option 'ranks_per_host' is 3; allowed is a number that divides the 4 ranks"}


def left_dense(rank: int, world_size: int) -> str:
    module, compiled = ddp_of(Net(), {"gradient_scheme": "two_level"}, inside=False)
    train(module, compiled, rank, range(1))
    return dct_compile.report().sites[0].reason


def test_without_hosts_the_report_names_the_option(ranks2: Ranks) -> None:
    assert all("ranks_per_host" in reason for reason in ranks2(left_dense))


def levels(rank: int, world_size: int) -> list[tuple[str, int]]:
    comm = RUNTIME.workers.of(dist.group.WORLD).comm(PER_HOST)
    return [(item.group, item.size) for item in (comm, comm.inside, comm.across)]


def test_each_level_has_a_group_of_its_own(ranks4: Ranks) -> None:
    for found in ranks4(levels):
        assert [size for _, size in found] == [4, 2, 2]
        assert len({name for name, _ in found}) == 3


def groups_made(rank: int, world_size: int, scheme: str) -> int:
    module, compiled = ddp_of(Net(), {**OPTIONS, "gradient_scheme": scheme}, inside=False)
    train(module, compiled, rank, range(1))
    return len(RUNTIME.workers.of(dist.group.WORLD)._made)


@pytest.mark.parametrize(("scheme", "count"), [("gather", 1), ("two_level", 3)])
def test_groups_of_hosts_are_made_where_they_are_used(ranks4: Ranks, scheme: str, count: int) -> None:
    assert ranks4(groups_made, scheme) == [count] * 4
