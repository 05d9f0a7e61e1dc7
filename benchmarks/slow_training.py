"""Trainings on slow links up to a loss: the one that dense training has after some steps."""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from slow_cells import METHODS, RATES, WORKLOADS

LEARNING_RATES = {"PowerSGD hook, rank 1": 0.5, "PowerSGD hook, rank 4": 0.5}
"""The best learning rate of a method as a multiple of the model's, where it is another one (GPT, docs/accuracy.md)."""
MOST_TIMES_DENSE = 4
"""A method gives up after so many times the steps of dense training."""
EVERY = 10
"""Steps between two points of a curve."""


@dataclass(frozen=True)
class Training:
    """A training. ``aim``: the loss at which it ends, that of dense training after ``dense_steps`` steps; of that itself, its last one."""

    model: str
    hosts: int
    rate: str
    method: str
    seed: int
    dense_steps: int
    aim: float


@dataclass(frozen=True)
class Point:
    """After ``step`` steps, which took ``seconds``: the mean training loss of the last steps, over all hosts."""

    step: int
    seconds: float
    loss: float


class LossFile:
    """A CSV file of trainings, to which each is appended when it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(field.name for kind in (Training, Point) for field in fields(kind)) + "\n")

    def read(self) -> dict[Training, list[Point]]:
        """Returns the curve of each training."""
        found: dict[Training, list[Point]] = {}
        with self.path.open(newline="") as file:
            for row in csv.DictReader(file):
                training = Training(**{field.name: field.type(row[field.name]) for field in fields(Training)})  # type: ignore[operator]
                found.setdefault(training, []).append(Point(int(row["step"]), float(row["seconds"]), float(row["loss"])))
        return found

    def add(self, training: Training, curve: Iterable[Point]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([*asdict(training).values(), *asdict(point).values()] for point in curve)


def to_loss(
    ask: Callable[..., list[dict[str, Any]]],
    model: str,
    hosts: int,
    rates: Sequence[str],
    methods: Sequence[str],
    dense_steps: int,
    seeds: Iterable[int],
    file: LossFile,
) -> None:
    """Trains ``model`` by each method and at each rate of the links until its loss is that of dense training after ``dense_steps`` steps.

    Dense training comes first. All trainings of a seed see the same batches. One that ``file`` holds is not made again.
    """
    baseline = next(iter(METHODS))
    own = WORKLOADS[model].task.recipe.optimization.lr
    for method in [baseline, *(name for name in methods if name != baseline)]:
        built = False
        for rate in rates:
            for seed in seeds:
                known = file.read()
                place = (model, hosts, rate)
                if any((t.model, t.hosts, t.rate, t.method, t.seed, t.dense_steps) == (*place, method, seed, dense_steps) for t in known):
                    continue
                if not built:
                    ask(None, do="build", model=model, method=method)
                    built = True
                aim = None if method == baseline else _aim(known, Training(*place, baseline, seed, dense_steps, 0.0))
                steps = dense_steps if aim is None else MOST_TIMES_DENSE * dense_steps
                command = {"seed": seed, "steps": steps, "aim": aim, "every": EVERY, "rate": own * LEARNING_RATES.get(method, 1.0)}
                curve = [Point(*point) for point in ask(RATES[rate], do="train", **command)[0]["curve"]]
                file.add(Training(*place, method, seed, dense_steps, curve[-1].loss if aim is None else aim), curve)
                print(f"{method}, {rate}, seed {seed}: {curve[-1]}", flush=True)


def _aim(known: dict[Training, list[Point]], dense: Training) -> float:
    """Returns the loss of dense training; ``dense`` is that training but for its aim."""
    return next(found.aim for found in known if asdict(found) | {"aim": 0.0} == asdict(dense))
