"""The report's bytes are those on the wire: the sockets of all ranks are counted while a model trains."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from dct_compile.bench.sockets import sent_bytes
from tests.rank_pool import Ranks
from tests.ranks_ddp import ddp_of
from tests.ranks_simple_fsdp import simple_fsdp

pytestmark = pytest.mark.distributed
STEPS = 4
FRAMING = 1440
"""Bytes per step, rank and peer that gloo's headers may take: 144 per message, and a step has up to ten messages to a peer."""


class Wide(nn.Module):
    """Two linear layers; ``between`` is what happens between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.between, self.top = nn.Linear(64, 1024), between, nn.Linear(1024, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.between(self.bottom(x)))


def exchange(x: Tensor) -> Tensor:
    return funcol.all_to_all_single_autograd(x.relu(), None, None, dist.group.WORLD)


def gather(x: Tensor) -> Tensor:
    return funcol.all_gather_tensor_autograd(x.relu(), 0, dist.group.WORLD)


def ddp(model: nn.Module, options: dict[str, Any], **settings: Any) -> Callable[..., Any]:
    return ddp_of(model, options, inside=False, **settings)[1]


def delayed(model: Wide) -> Callable[..., Any]:
    last = model.top.weight
    module = DistributedDataParallel(model, delay_all_reduce_named_params=[("top.weight", last)], param_to_hook_all_reduce=model.top.bias)
    return torch.compile(module, backend=dct)


def in_graph(model: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend=dct, options=options)


def shards(options: dict[str, Any], copies: int = 1, **settings: Any) -> Callable[..., Any]:
    model, ranks = Wide(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (copies, ranks // copies), mesh_dim_names=("copies", "shards"))
    for part in (model.top, model):
        fully_shard(part, mesh=mesh["shards"] if copies == 1 else mesh, **settings)
    return in_graph(model, options)


CASES: dict[str, Callable[[], Callable[..., Any]]] = {
    "ddp gather": lambda: ddp(Wide(), {"gradient_scheme": "gather"}),
    "ddp owner": lambda: ddp(Wide(), {"gradient_scheme": "owner"}),
    "ddp powersgd": lambda: ddp(Wide(), {"gradient_scheme": "powersgd", "rank": 8}),
    "ddp dense": lambda: ddp(Wide(), {"dp_density": 1}),
    "ddp buffers": lambda: ddp(Wide(nn.BatchNorm1d(1024)), {}),
    "ddp unused": lambda: ddp(Wide(), {}, find_unused_parameters=True),
    "ddp delayed": lambda: delayed(Wide()),
    "data_parallel": lambda: in_graph(Wide(), {"data_parallel": True}),
    "all_to_all": lambda: in_graph(Wide(exchange), {"data_parallel": True}),
    "all_to_all dense": lambda: in_graph(Wide(exchange), {"mp_density": 1}),
    "all_gather": lambda: in_graph(Wide(gather), {}),
    "fsdp": lambda: shards({}),
    "fsdp kept": lambda: shards({"parameter_codec": "bfloat16"}, reshard_after_forward=False),
    "fsdp gradients": lambda: shards({"parameter_codec": "dense"}),
    "simple fsdp": lambda: in_graph(simple_fsdp(Wide(), init_device_mesh("cpu", (dist.get_world_size(),))), {}),
    "hsdp": lambda: shards({}, copies=2),
}


def counted(rank: int, world_size: int, name: str) -> tuple[float, int, str]:
    """Returns bytes per step by the sockets and by the report, and the report."""
    model, start = CASES[name](), 0
    for step in range(3 + STEPS):
        if step == 3:  # connections are made, buckets rebuilt, and the ranks agree
            dist.barrier()
            start = sent_bytes()
        model(torch.randn(24 * world_size, 64)).square().mean().backward()
    measured = (sent_bytes() - start) / STEPS
    report = dct_compile.report()
    return measured, report.wire_bytes, str(report)


def check(results: list[tuple[float, int, str]]) -> None:
    """Compares the means over the ranks: a broadcast leaves one of them."""
    measured, reported = (sum(values) / len(results) for values in list(zip(*results, strict=True))[:2])
    assert reported > 0
    assert reported <= measured <= 1.01 * reported + FRAMING * (len(results) - 1), f"{measured:.0f} bytes per step\n{results[0][2]}"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_send_what_the_report_says(ranks2: Ranks, name: str) -> None:
    check(ranks2(counted, name))


def test_four_ranks_send_what_the_report_says(ranks4: Ranks) -> None:
    check(ranks4(counted, "hsdp"))


@pytest.mark.parametrize("name", ["ddp gather", "ddp owner", "ddp powersgd", "ddp buffers", "all_to_all", "all_gather", "fsdp"])
def test_three_ranks_send_what_the_report_says(ranks3: Ranks, name: str) -> None:
    check(ranks3(counted, name))
