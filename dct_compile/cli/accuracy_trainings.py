"""The trainings of ``dct bench accuracy``, one for each cut, codec, learning rate and seed."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dct_compile.bench.activation_codecs import CODECS
from dct_compile.bench.record import Record, Run
from dct_compile.cli.cut_models import CUTS
from dct_compile.cli.progress import Progress
from dct_compile.models.parallel import Mesh
from dct_compile.models.recipes import RECIPES
from dct_compile.models.tasks import TASKS, DataSource, Task

RUN = ("cut", "steps", "samples", "codec", "rate", "seed")
RATES = {"gpt": (0.002, 0.004, 0.008), "dlrm": (0.01, 0.02, 0.04)}
ALONE = Mesh(1, 1, 0, 0, None, None)


def task_of(model: str, samples: int | None) -> Task:
    """Returns the task that trains ``model``, with the first ``samples`` of its data."""
    recipe = RECIPES[model]
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


def losses(record: Record, task: Task, cut: str, codec: str, rates: Sequence[float], steps: int, seeds: int) -> tuple[float, list[float]]:
    """Returns the best rate of a codec, by the first seed, and the losses of all seeds at that rate."""

    def loss_of(rate: float, seed: int) -> float:
        run: Run = (cut, steps, task.source.max_samples or 0, codec, rate, seed)
        if not record.rows(run):
            record.add(run, [[train(task, cut, codec, rate, seed, steps)]])
        return record.rows(run)[0][0]

    best = min(rates, key=lambda rate: loss_of(rate, 0))
    return best, [loss_of(best, seed) for seed in range(seeds)]
