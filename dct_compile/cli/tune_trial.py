"""One trial of ``dct tune``: a training with given options, on ranks in processes of its own."""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from dct_compile.cli.asked import place_of
from dct_compile.cli.methods import compile_with
from dct_compile.cli.ranks import run_ranks
from dct_compile.cli.settings import Settings
from dct_compile.cli.targets import function_in
from dct_compile.cli.worker import Trainer
from dct_compile.models.parallel import make_mesh
from dct_compile.models.recipes import RECIPES
from dct_compile.tuning import RESULT, Measured, report
from dct_compile.workarounds.gloo import shorten_names

_EXPECTED = f"a model ({', '.join(RECIPES)}) or file.py:function, where the function takes a dict of options"


class TrialError(RuntimeError):
    """A training has failed, or reported nothing that can be compared."""


@dataclass(frozen=True)
class Trainable:
    """What all trials train: a ``target`` on ``ranks`` ranks. ``steps``: of a model of this project, ``None`` for its own."""

    target: str
    ranks: int
    steps: int | None
    timeout_s: float | None

    def check(self, fixed: dict[str, Any]) -> None:
        """Raises ``ValueError`` for what would fail in every trial. ``fixed``: the options of all trials."""
        if self.target not in RECIPES:
            place_of(self.target, _EXPECTED)
            if self.steps is not None:
                raise ValueError("--steps is for models of this project: a function of yours has its own")
            return
        mp = RECIPES[self.target].mp or 1
        if self.ranks % mp or self.ranks == mp:
            raise ValueError(f"{self.target} has {mp} model-parallel ranks: it needs --ranks {2 * mp} or another larger multiple")
        self.settings(fixed).check()

    def settings(self, options: dict[str, Any]) -> Settings:
        """Returns what ``dct train`` would be told for one training of a model of this project, by its recipe."""
        recipe = RECIPES[self.target]
        steps, mp = self.steps or recipe.steps, recipe.mp or 1
        return Settings(
            model=self.target,
            dataset=recipe.datasets[0],
            criteo_path=None,
            fashion_mnist_path=None,
            max_samples=None,
            dp=self.ranks // mp,
            mp=mp,
            backends=("dct",),
            options=options,
            seeds=1,
            epochs=None if steps is not None else recipe.epochs,
            steps=steps,
            batch_size=recipe.batch_size,
            optimization=recipe.optimization,
            rates={},
            check_every=100,
            out=Path(),
        )

    def run(self, options: Mapping[str, Any], folder: Path) -> Measured:
        """Trains once. The output of each rank goes to a file in ``folder``. Raises :class:`TrialError`."""
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / "result.json"
        result.unlink(missing_ok=True)
        # The store is this process's own: no other run on this machine can take its port meanwhile.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            run_ranks(_work, (self, dict(options), folder, store.port), self.ranks, self.timeout_s)
        except click.ClickException as error:
            raise TrialError(f"{error.message.strip().splitlines()[-1]} (output: {folder})") from error
        if not result.exists():
            raise TrialError(f"rank 0 has ended without a call of dct_compile.tuning.report (output: {folder})")
        values = json.loads(result.read_text(encoding="utf-8"))
        measured = Measured(**{**values, "kinds": tuple(values["kinds"])})
        if not math.isfinite(measured.loss):
            raise TrialError(f"the loss is {measured.loss}")
        return measured


def _work(rank: int, trainable: Trainable, options: dict[str, Any], folder: Path, port: int) -> None:
    """Trains as one rank, with the environment that torchrun would give."""
    output = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    ranks = str(trainable.ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), RESULT: str(folder / "result.json")}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _function(trainable)(options)


def _function(trainable: Trainable) -> Callable[[dict[str, Any]], object]:
    if trainable.target in RECIPES:
        return lambda options: _train(trainable, options)
    path, name = place_of(trainable.target, _EXPECTED)
    return function_in(path, name, "that takes a dict of options and calls dct_compile.tuning.report")


def _train(trainable: Trainable, options: dict[str, Any]) -> None:
    """Trains a model of this project, by its recipe and with its first seed, and reports the loss of its test."""
    settings = trainable.settings(options)
    torch.set_num_threads(1)
    shorten_names()
    dist.init_process_group("gloo")
    mesh, task = make_mesh(settings.dp, settings.mp), settings.task()
    model = task.build(mesh)
    run = Trainer("dct", settings, task, mesh, model, compile_with("dct", model, mesh, options)).run(0)
    loss = next(metric.name for metric in task.metrics if not metric.higher_is_better)
    report(run.metrics[loss], statistics.median(run.seconds))
    dist.barrier()
    dist.destroy_process_group()


def checked(trainable: Trainable, fixed: dict[str, Any]) -> Trainable:
    """Returns ``trainable``. Raises ``click.UsageError`` for what would fail in every trial. ``fixed``: the options of all trials."""
    try:
        trainable.check(fixed)
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    return trainable
