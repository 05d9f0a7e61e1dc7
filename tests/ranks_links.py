"""Calls that ranks make for tests of the link: measured, recognised, waited for, and decided by."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile import links
from dct_compile.link import Link
from dct_compile.link_measure import measured
from dct_compile.links import Links, agreed, host, on_one_machine
from dct_compile.runtime import RUNTIME
from tests.ranks_ddp import Exchanging, Net, Options, batch, loss_of


def measure(rank: int, world_size: int) -> dict[str, float]:
    assert dist.group.WORLD is not None
    start = time.perf_counter()
    found = asdict(measured(dist.group.WORLD, [host()] * world_size))
    assert time.perf_counter() - start < 60  # two seconds, on a machine that does nothing else
    return found


def on_hosts(number: int) -> Any:
    """Lets this rank seem to be on the host of that number."""
    return patch.object(links, "host", lambda: f"host {number}")


def agree_on_one(rank: int, world_size: int) -> Link | None:
    """Looks for the link of ranks that nobody has said to be on one machine; they are."""
    assert dist.group.WORLD is not None
    return agreed(dist.group.WORLD, lambda group, hosts: Link(1.0))


def agree(rank: int, world_size: int, absent: int | None) -> Link | None:
    """All ranks but ``absent`` look for the link; that one comes when the others have given up."""
    assert dist.group.WORLD is not None
    if rank == absent:
        time.sleep(3)
    with on_hosts(rank):
        return agreed(dist.group.WORLD, lambda group, hosts: Link(100.0 + rank, 1.0, 1.0), patience_s=1.0 if absent is not None else 60.0)


def agree_on_two(rank: int, world_size: int) -> list[bool]:
    """Two threads look for the links of two groups, each rank in another order. Returns whether each link is known."""
    known, groups = Links(), [dist.new_group(list(range(world_size))) for _ in range(2)]
    first, other = groups if rank == 0 else groups[::-1]
    apart, measuring = patch.object(links, "on_one_machine", lambda: False), patch.object(links, "measured", lambda *_: Link(100.0))
    with on_hosts(rank), apart, measuring, ThreadPoolExecutor(2) as pool:
        begun = pool.submit(known.of, first, "auto")
        time.sleep(0.5)
        return [found.result() is not None for found in (begun, pool.submit(known.of, other, "auto"))]


def recognise(rank: int, world_size: int) -> list[Any]:
    """Returns what is said about the machine: by the store; by a launcher with all ranks here, and with some of them."""
    found: list[Any] = [on_one_machine()]
    for local in (world_size, 1):
        os.environ["LOCAL_WORLD_SIZE"] = str(local)
        found.append(on_one_machine())
    del os.environ["LOCAL_WORLD_SIZE"]
    assert dist.group.WORLD is not None
    known = Links()
    found += [known.of(dist.group.WORLD, option) for option in ("auto", Link(5.0), None)]
    return found


def decide(rank: int, world_size: int, options: Options, hosts: int, outside: bool) -> tuple[list[tuple[str, str]], bool, float]:
    """Trains for two steps with ranks that seem to be on ``hosts``. Returns decisions and reasons, whether DDP has a hook, and a weight."""
    RUNTIME.links.auto = "auto"
    with patch.dict(os.environ, LOCAL_WORLD_SIZE=str(world_size // hosts)), on_hosts(rank % hosts):
        net = Net(width=64)
        module: Any
        if outside:
            module = torch.compile(DistributedDataParallel(net), backend="dct", options=options)
        else:
            module = torch.compile(net, backend="dct", options={**options, "data_parallel": True})
        for step in range(2):
            loss_of(module(batch(rank, step))).backward()
    report = dct_compile.report()
    attached = [found.compressor is not None for found in RUNTIME.attached.values()]
    assert net.bottom.weight.grad is not None
    total = float(net.bottom.weight.grad.double().sum())
    return [(site.decision, site.reason) for site in report.sites], any(attached), total


def measure_in_a_graph(rank: int, world_size: int) -> tuple[bool, list[str]]:
    """Compiles a model whose graph exchanges. Returns whether the measurement saw real tensors, and the decisions for a slow link."""
    RUNTIME.links.auto = "auto"
    real: list[bool] = []

    def measured(group: dist.ProcessGroup, hosts: list[str]) -> Link:
        real.append(type(torch.zeros(1)) is torch.Tensor)
        return Link(1e6, 1e-4, 1e10)

    with patch.dict(os.environ, LOCAL_WORLD_SIZE="1"), on_hosts(rank), patch.object(links, "measured", measured):
        loss_of(torch.compile(Exchanging(), backend="dct")(batch(rank, 0))).backward()
    return real == [True], [site.decision for site in dct_compile.report().sites]


def explain(rank: int, world_size: int) -> list[str]:
    """One rank alone asks what would become of a model whose link was not measured."""
    RUNTIME.links.auto = "auto"
    if rank > 0:
        return []
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="1"):
        report = dct_compile.explain(DistributedDataParallel(Net(), init_sync=False), batch(0, 0))
    return [site.decision for site in report.sites]
