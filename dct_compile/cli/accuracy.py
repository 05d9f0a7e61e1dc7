"""``dct bench accuracy``: what codecs of activations cost, by cut and model, each at its best learning rate, over seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch._C._distributed_c10d import HashStore

from dct_compile.bench.activation_codecs import CODECS
from dct_compile.bench.machine import circumstances
from dct_compile.bench.record import Record, Run
from dct_compile.cli.cut_models import CUTS
from dct_compile.cli.extras import require
from dct_compile.cli.progress import Progress
from dct_compile.models.parallel import Mesh
from dct_compile.models.sources import MissingData
from dct_compile.models.tasks import TASKS, DataSource, Task

RUN = ("cut", "steps", "samples", "codec", "rate", "seed")
RATES = {"gpt": (0.002, 0.004, 0.008), "dlrm": (0.01, 0.02, 0.04)}
ALONE = Mesh(1, 1, 0, 0, None, None)
RESULTS = Path("runs/activations.csv")


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
    with Progress(steps, f"{cut}, {codec}, rate {rate:g}, seed {seed}") as progress:
        for batch in task.batches(seed, steps, ALONE):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            schedule.step()
            progress.step()
    return task.test(model, model, seed, ALONE)[task.metrics[0].name]


def chosen(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
    """Returns the names that ``value`` lists. Raises ``BadParameter`` for one that is not known."""
    known = CUTS if param.name == "cuts" else CODECS
    for name in (names := value.split(";")):
        if name not in known:
            raise click.BadParameter(f"{name!r} is none of {'; '.join(known)}", ctx, param)
    return names


def losses(record: Record, task: Task, cut: str, codec: str, rates: Sequence[float], steps: int, seeds: int) -> tuple[float, list[float]]:
    """Returns the best rate of a codec, by the first seed, and the losses of all seeds at that rate."""

    def loss_of(rate: float, seed: int) -> float:
        run: Run = (cut, steps, task.source.max_samples or 0, codec, rate, seed)
        if not record.rows(run):
            record.add(run, [[train(task, cut, codec, rate, seed, steps)]])
        return record.rows(run)[0][0]

    best = min(rates, key=lambda rate: loss_of(rate, 0))
    return best, [loss_of(best, seed) for seed in range(seeds)]


@click.command()
@click.option("--steps", default=500, show_default=True, help="Steps of each run.")
@click.option("--seeds", default=3, show_default=True, help="Seeds of each codec at its best learning rate.")
@click.option("--cuts", default=";".join(CUTS), callback=chosen, help="What is cut, separated by semicolons.")
@click.option("--codecs", default=";".join(CODECS), callback=chosen, help="Codecs, separated by semicolons; the first is the baseline.")
@click.option("--rates", default="", help="Learning rates, each tried with the first seed; by model without this option.")
@click.option("--samples", type=int, help="The first so many samples of each data set; all without this option.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.", show_default=True)
def accuracy(steps: int, seeds: int, cuts: list[str], codecs: list[str], rates: str, samples: int | None, results: Path) -> None:
    """Train models whose activations are compressed where parallelisms would send them.

    Two simulated ranks in one process exchange what two real ones would, coded by the kernels of this project. The GPT learns Shakespeare
    byte by byte under AdamW, DLRM learns clicks of MovieLens-100k under Adagrad. Runs that the results hold are not made again.
    """
    require("tqdm")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # DLRM's test gathers over it
    results.parent.mkdir(parents=True, exist_ok=True)
    record, rows, tried = Record(results, RUN, ("loss",)), [], [float(rate) for rate in rates.split(",") if rate]
    try:
        for cut in cuts:
            model, width, _ = CUTS[cut]
            task, base = task_of(model, samples), 0.0
            for number, codec in enumerate(codecs):
                best, found = losses(record, task, cut, codec, tried or RATES[model], steps, seeds)
                mean, spread = statistics.mean(found), statistics.stdev(found) if seeds > 1 else 0.0
                base = base if number else mean
                rows.append([cut, codec, f"{CODECS[codec].ratio(width):.1f}", best, f"{mean:.4f} ± {spread:.4f}", f"{mean - base:+.4f}"])
    except MissingData as error:
        raise click.ClickException(str(error)) from error
    finally:
        dist.destroy_process_group()
    click.echo(f"Test loss after {steps} steps, {seeds} seeds, mean and standard deviation; {circumstances()}")
    click.echo(tabulate(rows, ["cut", "codec", "fewer bytes", "rate", "loss", "to the first"], disable_numparse=True))
