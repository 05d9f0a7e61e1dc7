"""What one more exchange costs, however few its bytes are: hooks, threads, operators, messages. Dense, and compressed.

The same small model is cut into one exchange, and into one for each of its layers. The difference of a step, by the number of exchanges in
between, is the price of one. All ranks run on this machine, over loopback; the variants take turns.

    python benchmarks/exchange_starts.py [--ranks 2] [--rounds 15]
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from dct_compile.bench.machine import circumstances

LAYERS, WIDTH, BATCH = 13, 64, 4
WARM_UP, STEPS = 20, 20
"""Steps before the first round, and steps of a round for each variant."""
DENSE, COMPRESSED = "inductor", "dct"


class Net(nn.Module):
    """Layers of 16 kB each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] -> the same shape."""
        for layer in self.layers:
            x = layer(x).relu()
        return x


def ddp(exchanges: int) -> nn.Module:
    """Returns the model under DDP, in one bucket or in one for each layer."""
    return DistributedDataParallel(Net(), bucket_cap_mb=100 if exchanges == 1 else 0.01)


def fsdp(exchanges: int) -> nn.Module:
    """Returns the model sharded as a whole, or by layer."""
    model, mesh = Net(), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers if exchanges > 1 else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, Callable[[int], nn.Module]] = {"DDP": ddp, "FSDP2": fsdp}
"""One exchange of FSDP2 is an all_gather for the forward, one for the backward, and a reduce_scatter."""


class Training:
    """A compiled model in training."""

    def __init__(self, wrapper: str, backend: str, exchanges: int) -> None:
        torch._dynamo.reset()
        model = WRAPPERS[wrapper](exchanges)
        options: dict[str, Any] | None = {"link": None, "min_numel": 1} if backend == COMPRESSED else None
        self.model = torch.compile(model, backend=backend, options=options)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self.x = torch.randn(BATCH, WIDTH)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.model(self.x).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def _ms_per_step(training: Training) -> tuple[float, float]:
    """Returns milliseconds of a step: elapsed, and of all threads of this rank."""
    dist.barrier()
    start, cpu_start = time.perf_counter(), time.process_time()
    training.steps(STEPS)
    return (time.perf_counter() - start) / STEPS * 1e3, (time.process_time() - cpu_start) / STEPS * 1e3


def _rank(rank: int, folder: str, ranks: int, rounds: int) -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows: list[list[Any]] = []
    for wrapper in WRAPPERS:
        variants = list(itertools.product((DENSE, COMPRESSED), (1, LAYERS)))
        trainings = {(backend, exchanges): Training(wrapper, backend, exchanges) for backend, exchanges in variants}
        for training in trainings.values():
            training.steps(WARM_UP)
        times: dict[tuple[str, int], list[tuple[float, float]]] = {variant: [] for variant in variants}
        for _ in range(rounds):
            for variant, training in trainings.items():
                times[variant].append(_ms_per_step(training))
        medians = {variant: [statistics.median(column) for column in zip(*found, strict=True)] for variant, found in times.items()}
        prices = {
            backend: [(many - one) / (LAYERS - 1) for one, many in zip(medians[backend, 1], medians[backend, LAYERS], strict=True)]
            for backend in (DENSE, COMPRESSED)
        }
        first = [compressed - dense for dense, compressed in zip(medians[DENSE, 1], medians[COMPRESSED, 1], strict=True)]
        more = [compressed - dense for dense, compressed in zip(prices[DENSE], prices[COMPRESSED], strict=True)]
        rows.append([wrapper, *prices[DENSE], *prices[COMPRESSED], *more, *first])
    if rank == 0:
        print(f"milliseconds of one more exchange, {ranks} ranks; {circumstances()}")
        heads = [f"{name}{what}" for name in ("dense", "compressed", "difference", "of the first one") for what in ("", ", CPU")]
        print(tabulate(rows, ["", *heads], floatfmt=".3f"))
    dist.barrier()
    dist.destroy_process_group()


@click.command()
@click.option("--ranks", default=2, type=click.IntRange(min=2), help="Ranks, all on this machine.")
@click.option("--rounds", default=15, type=click.IntRange(min=1), help=f"Rounds of {STEPS} steps for each variant.")
def main(ranks: int, rounds: int) -> None:
    """Prints what one more exchange costs, dense and compressed."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (folder, ranks, rounds), nprocs=ranks)


if __name__ == "__main__":
    main()
