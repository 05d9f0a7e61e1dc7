"""Accuracy of compressed activations: codec by cut by model, each at its best learning rate, over seeds, simulated in one process.

Two simulated ranks exchange what two real ones would, coded by the kernels of the product. The GPT learns Shakespeare byte by byte under
AdamW, DLRM learns clicks of MovieLens-100k under Adagrad.

    python benchmarks/activations.py [--steps 500] [--seeds 3] [--cuts "tensor parallel;pipeline"] [--codecs "dense;int8"]
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.distributed as dist
from activation_codecs import CODECS
from cut_models import CUTS
from record import Record, Run
from tabulate import tabulate
from torch._C._distributed_c10d import HashStore

from dct_compile.bench.machine import circumstances
from dct_compile.models.parallel import Mesh
from dct_compile.models.tasks import TASKS, DataSource, Task

RUN = ("cut", "steps", "codec", "rate", "seed")
RATES = {"gpt": (0.002, 0.004, 0.008), "dlrm": (0.01, 0.02, 0.04)}
ALONE = Mesh(1, 1, 0, 0, None, None)
RESULTS = Path(__file__).parent / "results" / "activations.csv"


def task_of(model: str, samples: int | None) -> Task:
    """Returns the task that trains ``model``, with the first ``samples`` of its data."""
    recipe = TASKS[model].recipe
    return TASKS[model](DataSource(recipe.datasets[0], None, samples), recipe.batch_size)


def train(task: Task, cut: str, codec: str, rate: float, seed: int, steps: int) -> float:
    """Trains a model that is cut; returns the first metric of its test: a loss, of which less is better."""
    model = task.build(ALONE)
    task.reset(model, ALONE, seed)
    torch.manual_seed(seed)  # of the experts
    CUTS[cut][2](model, CODECS[codec])
    optimizer, schedule = replace(task.recipe.optimization, lr=rate).start(model.parameters(), steps)
    model.train()
    for batch in task.batches(seed, steps, ALONE):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    return task.test(model, model, seed, ALONE)[task.metrics[0].name]


def losses(record: Record, task: Task, cut: str, codec: str, rates: Sequence[float], steps: int, seeds: int) -> tuple[float, list[float]]:
    """Returns the best rate of a codec, by the first seed, and the losses of all seeds at that rate."""

    def loss_of(rate: float, seed: int) -> float:
        run: Run = (cut, steps, codec, rate, seed)
        if not record.rows(run):
            record.add(run, [[train(task, cut, codec, rate, seed, steps)]])
        return record.rows(run)[0][0]

    best = min(rates, key=lambda rate: loss_of(rate, 0))
    return best, [loss_of(best, seed) for seed in range(seeds)]


@click.command()
@click.option("--steps", default=500, help="Steps of each run.")
@click.option("--seeds", default=3, help="Seeds of each codec at its best learning rate.")
@click.option("--cuts", default=";".join(CUTS), help="What is cut, separated by semicolons.")
@click.option("--codecs", default=";".join(CODECS), help="Codecs, separated by semicolons; the first is the baseline.")
@click.option("--rates", default="", help="Learning rates, each tried with the first seed; by model without this option.")
@click.option("--samples", type=int, help="The first so many samples of each data set; all without this option.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.")
def main(steps: int, seeds: int, cuts: str, codecs: str, rates: str, samples: int | None, results: Path) -> None:
    """Prints a table, and keeps all runs in the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # DLRM's test gathers over it
    tried = [float(rate) for rate in rates.split(",") if rate]
    record, rows = Record(results, RUN, ("loss",)), []
    for cut in cuts.split(";"):
        model, width, _ = CUTS[cut]
        task, dense = task_of(model, samples), 0.0
        for number, codec in enumerate(codecs.split(";")):
            best, found = losses(record, task, cut, codec, tried or RATES[model], steps, seeds)
            mean = statistics.mean(found)
            dense = dense if number else mean
            spread = statistics.stdev(found) if seeds > 1 else 0.0
            rows.append([cut, codec, f"{CODECS[codec].ratio(width):.1f}", best, f"{mean:.4f} ± {spread:.4f}", f"{mean - dense:+.4f}"])
    dist.destroy_process_group()
    print(f"Test loss after {steps} steps, {seeds} seeds, mean and standard deviation; {circumstances()}")
    print(tabulate(rows, ["cut", "codec", "fewer bytes", "rate", "loss", "to dense"], disable_numparse=True))


if __name__ == "__main__":
    main()
