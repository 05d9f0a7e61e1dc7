"""CPU time of a training step under DDP, by scheme: a rank's own, and the system's on its behalf.

All ranks run on this machine, over loopback; the CPU time of a step changes far less with other work on it than its duration.

    python benchmarks/exchange_cpu.py [--ranks 4] [--schemes "dense;gather;owner;two_level"]
"""

import resource
import tempfile
import time
from typing import Any

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.bench.machine import circumstances

WIDTH, LAYERS = 1024, 6
WARM_UP, STEPS = 4, 12


class Net(nn.Module):
    """Layers of 25 MB together."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def _rank(rank: int, folder: str, ranks: int, schemes: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = []
    for scheme in schemes:
        torch._dynamo.reset()
        dct_compile.reset_report()
        options: dict[str, Any] = {"gradient_scheme": scheme, "ranks_per_host": 2 if scheme == "two_level" else 1, "link": None}
        ddp = DistributedDataParallel(Net(), bucket_cap_mb=100)
        model = torch.compile(ddp) if scheme == "dense" else torch.compile(ddp, backend="dct", options=options)
        seconds = torch.tensor(_seconds_of_a_step(model, torch.randn(4, WIDTH)))
        dist.all_reduce(seconds, dist.ReduceOp.AVG)
        rows.append([scheme, *(f"{1e3 * value:.1f}" for value in seconds.tolist())])
    if rank == 0:
        print(f"{ranks} ranks, {4e-6 * sum(p.numel() for p in Net().parameters()):.0f} MB of gradients; {circumstances()}")
        print(tabulate(rows, ["scheme", "own CPU ms", "system's CPU ms", "ms of a step"], disable_numparse=True))
    dist.barrier()
    dist.destroy_process_group()


def _seconds_of_a_step(model: Any, x: Tensor) -> list[float]:
    """Returns the seconds of a step: on the CPU in the process itself and in the system, and by the clock."""
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            dist.barrier()
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        model(x).square().mean().backward()
    after, end = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    spent = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, end - start)
    return [seconds / STEPS for seconds in spent]


@click.command()
@click.option("--ranks", default=4, help="Ranks, on this machine. An even number, for two_level.")
@click.option("--schemes", default="dense;gather;owner;two_level", help="Schemes, separated by semicolons.")
def main(ranks: int, schemes: str) -> None:
    """Prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, ranks, schemes.split(";")), nprocs=ranks)


if __name__ == "__main__":
    main()
