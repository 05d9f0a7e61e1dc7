"""Test AUC of DLRM on MovieLens-100k under Adam, as a curve over the steps: dense and compressed, simulated in one process.

Two simulated ranks, half of each batch of 512 for each of them. All runs of one seed have the same split, initial values and batches.
`--product` trains some of the methods by the product itself, on two gloo ranks.

    python benchmarks/dlrm_adam.py [--epochs 4] [--rates 0.001,0.002,0.004] [--seeds 3] [--only "1 %"] [--product]
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from simulation import Method, Simulation
from tabulate import tabulate
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from dct_compile.bench.machine import circumstances
from dct_compile.bench.record import Record
from dct_compile.models.datasets import Samples, batches, load
from dct_compile.models.dlrm import DLRM
from dct_compile.models.metrics import auc, log_loss

TABLES, MLPS = ("embeddings",), ("bottom", "top")
METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "dense": (Method(density=1.0), {}),
    "1 %": (Method(), {}),
    "1 %, first moment kept": (Method(bypass=False), {}),
    "1 %, gaps": (Method(gaps=True), {}),
    "1 %, tables dense": (Method(exempt=TABLES), {}),
    "1 %, MLPs dense": (Method(exempt=MLPS), {}),
    "1 % after 50 dense steps": (Method(dense_steps=50), {}),
    "1 % after 156 dense steps": (Method(dense_steps=156), {}),
    "5 %": (Method(density=0.05), {}),
    "0.1 %": (Method(density=0.001), {}),
    "dense, beta1 0": (Method(density=1.0), {"betas": (0.0, 0.999)}),
    "dense, beta2 .99": (Method(density=1.0), {"betas": (0.9, 0.99)}),
    "1 %, beta2 .99": (Method(), {"betas": (0.9, 0.99)}),
    "1 %, eps 1e-4": (Method(), {"eps": 1e-4}),
    "dense, eps 1e-4": (Method(density=1.0), {"eps": 1e-4}),
}
PRODUCT: dict[str, dict[str, Any]] = {"dense": {"dp_density": 1.0}, "1 %": {}, "1 %, tables dense": {"exempt": ["embeddings.*"]}}
RANKS, BATCH, MIN_NUMEL = 2, 512, 128
RESULTS = Path(__file__).parent / "results"
RUN, MEASURED = ("method", "rate", "seed"), ("step", "test_auc", "test_log_loss")


def order(samples: Samples, seed: int, epochs: int) -> Iterator[Samples]:
    """Yields the batches of a run."""
    for epoch in range(epochs):
        yield from batches(samples, BATCH, seed=seed * 1000 + epoch)


def loss_of(model: Callable[..., Tensor], batch: Samples, rank: int) -> Tensor:
    """Returns the loss of a rank's half of a batch."""
    own = batch.take(torch.arange(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS))
    return binary_cross_entropy_with_logits(model(own.dense, own.ids), own.labels)


@torch.no_grad()
def test(model: torch.nn.Module, samples: Samples) -> tuple[float, float]:
    """Returns AUC and log-loss."""
    logits = model(samples.dense, samples.ids).numpy()
    return auc(logits, samples.labels.numpy()), log_loss(logits, samples.labels.numpy())


def curve(method: Method, settings: dict[str, Any], rate: float, seed: int, epochs: int, every: int) -> Iterator[tuple[float, ...]]:
    """Trains; yields step, test AUC and test log-loss ``every`` so many steps."""
    data = load("movielens", seed)
    model = DLRM(data.dense_features, data.tables, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, **settings)
    simulation = Simulation(model, optimizer, method, RANKS, MIN_NUMEL)
    for step, batch in zip(count(1), order(data.train, seed, epochs)):
        simulation.step(loss_of(model, batch, rank) for rank in range(RANKS))
        if step % every == 0:
            yield step, *test(model, data.test)


def _rank(rank: int, folder: str, path: Path, runs: list[tuple[str, float, int]], epochs: int, every: int) -> None:
    os.environ.setdefault("TORCH_LOGS", "-dynamo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for run in runs:
        rows = list(_product(*run, epochs, every))
        if rank == 0:
            Record(path, RUN, MEASURED).add(run, rows)
    dist.barrier()
    dist.destroy_process_group()


def _product(method: str, rate: float, seed: int, epochs: int, every: int) -> Iterator[tuple[float, ...]]:
    """Trains by the product, on this rank; yields what :func:`curve` does."""
    torch._dynamo.reset()
    data = load("movielens", seed)
    model = DLRM(data.dense_features, data.tables, seed=seed)
    options: dict[str, Any] = {"link": None, **PRODUCT[method]}
    compiled = torch.compile(DistributedDataParallel(model), backend="dct", options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for step, batch in zip(count(1), order(data.train, seed, epochs)):
        loss_of(compiled, batch, dist.get_rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            yield step, *test(model, data.test)


def train_all(record: Record, runs: list[tuple[str, float, int]], epochs: int, every: int, product: bool) -> None:
    """Does those ``runs`` (method, learning rate, seed) that are not in ``record`` yet."""
    missing = [run for run in runs if not record.rows(run)]
    if product and missing:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (folder, record.path, missing, epochs, every), nprocs=RANKS)
    for method, rate, seed in [] if product else missing:
        record.add((method, rate, seed), list(curve(*METHODS[method], rate, seed, epochs, every)))


def summary(curves: list[list[list[float]]], steps: int) -> list[float]:
    """Returns AUC (mean, least, most) and log-loss at ``steps``, and step, AUC and log-loss where the mean AUC is highest."""
    mean = [[statistics.mean(numbers) for numbers in zip(*rows, strict=True)] for rows in zip(*curves, strict=True)]
    at = next(row for row in mean if row[0] == steps)
    own = [row[1] for rows in curves for row in rows if row[0] == steps]
    return [at[1], min(own), max(own), at[2], *max(mean, key=lambda row: row[1])]


@click.command()
@click.option("--epochs", default=4, help="Epochs (156 steps) of each run.")
@click.option("--every", default=156, help="Steps between two tests.")
@click.option("--at", default=468, help="The step at which methods and learning rates are compared.")
@click.option("--rates", default="0.001,0.002,0.004", help="Learning rates, each tried with the first seed.")
@click.option("--seeds", default=3, help="Seeds of each method at its best learning rate.")
@click.option("--only", multiple=True, help="A method; all of them without this option.")
@click.option("--product", is_flag=True, help="Train by the product, on two ranks.")
def main(epochs: int, every: int, at: int, rates: str, seeds: int, only: tuple[str, ...], product: bool) -> None:
    """Prints a table, and keeps all runs in benchmarks/results/."""
    torch.set_num_threads(1)
    record = Record(RESULTS / f"dlrm_adam_{epochs}_epochs{'_product' if product else ''}.csv", RUN, MEASURED)
    tried = [float(rate) for rate in rates.split(",")]
    rows = []
    for method in only or (PRODUCT if product else METHODS):
        train_all(record, [(method, rate, 0) for rate in tried], epochs, every, product)
        best = max(tried, key=lambda rate: summary([record.rows((method, rate, 0))], at)[0])
        runs = [(method, best, seed) for seed in range(seeds)]
        train_all(record, runs, epochs, every, product)
        rows.append([method, best, *summary([record.rows(run) for run in runs], at)])
    print(f"DLRM, MovieLens-100k, {'product' if product else 'simulated'}, {RANKS} ranks, Adam, step {at}; {circumstances()}")
    heads = ["method", "rate", "AUC", "least", "most", "log-loss", "best step", "AUC there", "log-loss there"]
    print(tabulate(rows, heads, floatfmt=".4f"))


if __name__ == "__main__":
    main()
