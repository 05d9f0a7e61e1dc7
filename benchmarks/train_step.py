"""One training step of the demo model, dense against DCT, on gloo ranks of this machine; and the time of the first compilation.

Loopback is the worst case for compression: the link is as fast as memory, so only the costs show. The compared steps alternate in blocks
within one run. Compilations are measured in processes of their own with empty caches: the time of the first forward and backward.

    python benchmarks/train_step.py [--dp 2] [--mp 2] [--blocks 10]
"""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import binary_cross_entropy_with_logits

from dct_compile.bench.machine import circumstances
from dct_compile.bench.timing import summarise
from dct_compile.models.dlrm import DLRM
from dct_compile.models.parallel import Table, average_sharded_gradients, make_mesh, wrap_data_parallel

VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "inductor": ("inductor", None),
    "dct": ("dct", {"link": None}),
    "dct, undo_discarded=False": ("dct", {"link": None, "undo_discarded": False}),
    "dct, link='auto'": ("dct", None),
}
"""Backend and options by name. All are compared with the first."""
TABLES = tuple(Table(f"table{i}", rows) for i, rows in enumerate((1682, 943, 795, 61, 21, 19, 7, 2)))
DENSE_FEATURES, BATCH, STEPS_PER_BLOCK, WARMUP_STEPS = 4, 128, 20, 30


class Training:
    """A compiled model with its optimizer and one batch."""

    def __init__(self, variant: str, dp: int, mp: int) -> None:
        backend, options = VARIANTS[variant]
        self.mesh = make_mesh(dp, mp)
        self.model = DLRM(DENSE_FEATURES, TABLES, self.mesh.mp_group)
        self.compiled = torch.compile(wrap_data_parallel(self.model, self.mesh), backend=backend, options=options)
        self.optimizer = torch.optim.Adagrad(self.model.parameters(), lr=0.02, fused=True)
        generator = torch.Generator().manual_seed(self.mesh.dp_rank)
        self.dense = torch.randn(BATCH, DENSE_FEATURES, generator=generator)
        self.ids = torch.stack([torch.randint(0, table.rows, (BATCH,), generator=generator) for table in TABLES], dim=1)
        self.labels = torch.randint(0, 2, (BATCH,), generator=generator).float()

    def step(self) -> None:
        """Forward, backward, optimizer."""
        self.optimizer.zero_grad()
        binary_cross_entropy_with_logits(self.compiled(self.dense, self.ids), self.labels).backward()
        average_sharded_gradients(self.model, self.mesh.mp)
        self.optimizer.step()


def _steps(dp: int, mp_ranks: int, blocks: int) -> dict[str, list[float]]:
    trainings = {variant: Training(variant, dp, mp_ranks) for variant in VARIANTS}
    for training in trainings.values():
        for _ in range(WARMUP_STEPS):
            training.step()
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(blocks):
        for variant, training in trainings.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(STEPS_PER_BLOCK):
                training.step()
            times[variant].append((time.perf_counter() - start) / STEPS_PER_BLOCK * 1e3)
    return times


def _first_step(dp: int, mp_ranks: int, variant: str) -> float:
    training = Training(variant, dp, mp_ranks)
    start = time.perf_counter()
    training.step()
    return time.perf_counter() - start


def _rank(rank: int, world_size: int, folder: str, function: Any, *args: Any) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["LOCAL_WORLD_SIZE"] = f"{folder}/inductor", str(world_size)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    result = function(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def _run(world_size: int, function: Any, *args: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (world_size, folder, function, *args), nprocs=world_size)
        return torch.load(Path(folder) / "result.pt", weights_only=False)


@click.command()
@click.option("--dp", default=2, help="Data-parallel ranks.")
@click.option("--mp", "mp_ranks", default=2, help="Model-parallel ranks.")
@click.option("--blocks", default=10, help=f"Timed blocks of {STEPS_PER_BLOCK} steps per variant.")
@click.option("--compilations", default=3, help="First compilations per variant.")
def main(dp: int, mp_ranks: int, blocks: int, compilations: int) -> None:
    """Prints the step times, the compile times and their ratios."""
    size = dp * mp_ranks
    times = {variant: summarise(values) for variant, values in _run(size, _steps, dp, mp_ranks, blocks).items()}
    first: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(compilations):
        for variant in VARIANTS:
            first[variant].append(_run(size, _first_step, dp, mp_ranks, variant))
    rows, base = [], next(iter(VARIANTS))
    for variant in VARIANTS:
        step, compilation = times[variant], statistics.median(first[variant])
        ratios = step.median_ms / times[base].median_ms, compilation / statistics.median(first[base])
        rows.append([variant, step.median_ms, step.p20_ms, step.p80_ms, ratios[0], compilation, ratios[1]])
    print(f"DLRM, {dp} x {mp_ranks} gloo ranks on loopback, 1 thread each, batch {BATCH} per data-parallel rank; {circumstances()}")
    headers = ["variant", "step ms", "p20", "p80", "x inductor", "first step s", "x inductor"]
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
