"""Test loss or accuracy over steps and bytes: dense, compressed, and the hooks of torch's DDP that users would take instead.

All methods of a seed start from the same parameters and see the same batches. Each method is trained at every learning rate with the first
seed, and at its best one with the other seeds. Every run is appended to the results, and a run that is there is not made again.

    python benchmarks/optimizers.py --model gpt --steps 5000 --search-steps 1000
"""

import logging
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import torch
import torch.distributed as dist
from baselines import BASELINES
from matplotlib import pyplot as plt
from tabulate import tabulate
from torch._logging._internal import set_logs
from torch.multiprocessing.spawn import spawn

import dct_compile
from dct_compile.bench.machine import circumstances
from dct_compile.bench.record import Record
from dct_compile.cli.methods import Compiled, compile_with, computed_bytes
from dct_compile.models.parallel import Mesh, make_mesh
from dct_compile.models.tasks import TASKS, DataSource, Task

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **BASELINES,
    "dct 1 %": ("dct", {}),
    "dct 0.2 %": ("dct", {"dp_density": 0.002}),
    "dct 1 %, first moment kept": ("dct", {"first_moment": "keep"}),
    "dct 0.2 %, second moment plain": ("dct", {"dp_density": 0.002, "second_moment": "plain"}),
    "dct 1 %, density not held": ("dct", {"hold_density": False}),
    "dct 1 %, warm-up of 120 steps": ("dct", {"density_warmup": 120}),
    "dct 1 %, dense for 50 steps": ("dct", {"start_iter": 50}),
    "dct 1 %, late": ("dct", {"arrival": "late"}),
    "dct 1 %, int8": ("dct", {"dp_value_dtype": "int8"}),
    "dct 1.45 %, int8": ("dct", {"dp_density": 0.0145, "dp_value_dtype": "int8"}),
}
RESULTS = Path(__file__).parent / "results" / "optimizers.csv"


@dataclass(frozen=True)
class Run:
    """One training. ``coefficient``: AdamW's second one, or the momentum of SGD."""

    model: str
    ranks: int
    batch_size: int
    steps: int
    coefficient: float
    method: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Point:
    """What a test says after ``step`` steps, when each rank has sent ``megabytes``: the first metric of the task."""

    step: float
    metric: float
    megabytes: float


COLUMNS = tuple([item.name for item in fields(kind)] for kind in (Run, Point))


class Trainer:
    """Trains one model by one method. The graphs are compiled once, for all runs."""

    def __init__(self, run: Run, task: Task, mesh: Mesh) -> None:
        torch._dynamo.reset()
        dct_compile.reset_report()
        backend, options = METHODS[run.method]
        self.task, self.mesh, self.model = task, mesh, task.build(mesh)
        self.compiled: Compiled = compile_with(backend, self.model, mesh, {"link": None, **options})
        self.bytes = computed_bytes(backend, self.model, run.ranks)

    def train(self, run: Run, points: int) -> Iterator[Point]:
        """Trains, and yields ``points`` tests at equal distances."""
        self.task.reset(self.model, self.mesh, run.seed)
        self.compiled.restart()
        own = self.task.recipe.optimization
        betas = (own.betas[0], run.coefficient)
        optimization = replace(own, lr=run.rate, momentum=run.coefficient, betas=betas)
        optimizer, schedule = optimization.start(self.model.parameters(), run.steps)
        sent, tested, every = 0.0, 0, max(1, run.steps // points)
        self.compiled.module.train()
        for step, batch in enumerate(self.task.batches(run.seed, run.steps, self.mesh), start=1):
            self.task.loss(self.compiled.module, batch).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % every == 0 or step == run.steps:
                sent, tested = sent + self.bytes_between(tested + 1, step), step
                yield Point(step, self.task.test(self.model, self.compiled.module, run.seed, self.mesh)[self.metric], sent / 1e6)
                self.compiled.module.train()

    @property
    def metric(self) -> str:
        return self.task.metrics[0].name

    def bytes_between(self, first: int, last: int) -> float:
        """Returns what a rank sends from step ``first`` to step ``last``; "dct" reports what a step sends now."""
        if not self.bytes:
            return (last - first + 1) * float(sum(site.calls * site.wire_bytes for site in dct_compile.report().sites if site.training))
        return sum(next(size for begin, size in reversed(self.bytes) if begin <= step) for step in range(first, last + 1))


def _rank(rank: int, folder: str, runs: list[Run], points: int, results: Path) -> None:
    if "TORCH_LOGS" not in os.environ:
        set_logs(dynamo=logging.ERROR)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=runs[0].ranks)
    mesh = make_mesh(runs[0].ranks, 1)
    kind = TASKS[runs[0].model]
    task = kind(DataSource(kind.recipe.datasets[0]), runs[0].batch_size)
    trainer, of = None, ""
    for run in sorted(runs, key=lambda run: (run.seed, list(METHODS).index(run.method))):
        if trainer is None or of != run.method:
            trainer, of = Trainer(run, task, mesh), run.method
        made = list(trainer.train(run, points))
        if rank == 0:
            Record(results, *COLUMNS).add(astuple(run), map(astuple, made))
    dist.barrier()
    dist.destroy_process_group()


def make(runs: Sequence[Run], points: int, results: Path) -> dict[Run, list[Point]]:
    """Makes those of ``runs`` that are missing in ``results``, and returns all of them."""
    record = Record(results, *COLUMNS)
    missing = [run for run in dict.fromkeys(runs) if not record.rows(astuple(run))]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (folder, missing, points, results), nprocs=missing[0].ranks)
    return {run: [Point(*row) for row in record.rows(astuple(run))] for run in runs}


def draw(groups: dict[str, list[list[Point]]], title: str, path: Path) -> None:
    """Draws the metric over steps and over bytes: for each method the mean over seeds, and the band between the least and the most."""
    mpl.use("agg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name, seeds in groups.items():
        columns = list(zip(*seeds, strict=True))
        means = [statistics.mean(point.metric for point in column) for column in columns]
        least, most = ([pick(point.metric for point in column) for column in columns] for pick in (min, max))
        for axis, where in zip(axes, ("step", "megabytes"), strict=True):
            places = [getattr(column[0], where) for column in columns]
            (line,) = axis.plot(places, means, label=name)
            axis.fill_between(places, least, most, color=line.get_color(), alpha=0.2, linewidth=0)
    axes[0].set(xlabel="step", ylabel=title)
    axes[1].set(xlabel="MB that a rank has sent", xscale="log")
    axes[0].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--model", type=click.Choice(list(TASKS)), default="gpt", help="What is trained.")
@click.option("--ranks", default=2, help="Ranks, on this machine.")
@click.option("--batch-size", type=int, help="Samples per step, over all ranks. Default: the model's.")
@click.option("--steps", default=1000, help="Steps of each run.")
@click.option("--search-steps", type=int, help="Steps of the runs that find the best rate. Default: --steps.")
@click.option("--coefficient", type=float, help="AdamW's second coefficient, or the momentum of SGD. Default: the model's.")
@click.option("--rates", default="0.001,0.002,0.004,0.008", help="Learning rates, each tried with the first seed.")
@click.option("--seeds", default=3, help="Seeds of each method at its best learning rate.")
@click.option("--points", default=10, help="Tests in each run, but for those that find the best rate.")
@click.option("--methods", default="dense;dct 1 %", help=f"Methods, separated by semicolons: {'; '.join(METHODS)}.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draws the curves into this file.")
def main(
    model: str,
    ranks: int,
    batch_size: int | None,
    steps: int,
    search_steps: int | None,
    coefficient: float | None,
    rates: str,
    seeds: int,
    points: int,
    methods: str,
    results: Path,
    picture: Path | None,
) -> None:
    """Prints a table, and appends all runs to the results."""
    recipe, metric = TASKS[model].recipe, TASKS[model].metrics[0]
    own = recipe.optimization.momentum if recipe.optimization.optimizer == "sgd" else recipe.optimization.betas[1]
    first = Run(
        model, ranks, batch_size or recipe.batch_size, search_steps or steps, own if coefficient is None else coefficient, "", 0.0, 0
    )
    tried, chosen = [float(rate) for rate in rates.split(",")], [name.strip() for name in methods.split(";")]
    found = make([replace(first, method=method, rate=rate) for method in chosen for rate in tried], 1 if search_steps else points, results)
    better = max if metric.higher_is_better else min
    best = {name: better(tried, key=lambda rate: found[replace(first, method=name, rate=rate)][-1].metric) for name in chosen}
    long = {name: [replace(first, method=name, rate=best[name], steps=steps, seed=seed) for seed in range(seeds)] for name in chosen}
    found = make([run for runs in long.values() for run in runs], points, results)
    rows, groups = [], {name: [found[run] for run in runs] for name, runs in long.items()}
    for name, curves in groups.items():
        ends = [curve[-1].metric for curve in curves]
        megabytes = curves[0][-1].megabytes
        rows.append(
            [name, best[name], statistics.mean(ends), min(ends), max(ends), megabytes, groups[chosen[0]][0][-1].megabytes / megabytes]
        )
    print(f"{first}, {steps} steps; {circumstances()}")
    print(tabulate(rows, ["method", "best rate", metric.title, "least", "most", "MB sent", "x fewer"], floatfmt=".5g"))
    if picture is not None:
        draw(groups, metric.title, picture)


if __name__ == "__main__":
    main()
