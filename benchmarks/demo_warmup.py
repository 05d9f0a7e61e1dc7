"""The learning rate of the demo: trains its model with `dct train` for several schedules and rates, and keeps each seed's numbers.

python benchmarks/demo_warmup.py [--results demo_warmup.csv]

A run that the file of results holds is not made again.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from tabulate import tabulate

from dct_compile.bench.machine import circumstances
from dct_compile.bench.record import Record, Run

RUN, MEASURED = ("backend", "dp", "mp", "warmup", "schedule", "rate", "option", "seed"), ("auc", "log_loss", "highest_loss_of_20_steps")
RESULTS = Path(__file__).parent / "results" / "demo_warmup.csv"
Study = tuple[str, int, int, int, str, float, str, int]
"""Backend, data-parallel and model-parallel ranks, warm-up in steps, schedule, rate, an option of dct or "", number of seeds."""
ONE_PROCESS = ((0, 0.02), (0, 0.03), (20, 0.02), (20, 0.03), (50, 0.02), (50, 0.03), (50, 0.04), (50, 0.06), (100, 0.02), (100, 0.03))
STUDIES: tuple[Study, ...] = (
    *(("dense", 1, 1, warmup, "constant", rate, "", 3) for warmup, rate in ONE_PROCESS),
    ("dense", 2, 2, 50, "constant", 0.03, "", 5),
    ("dct", 2, 2, 50, "constant", 0.04, "", 3),
    ("dct", 2, 2, 50, "constant", 0.06, "", 5),
    ("dct", 2, 2, 50, "constant", 0.08, "", 5),
    ("dct", 2, 2, 50, "constant", 0.12, "", 5),
    ("dct", 2, 2, 50, "constant", 0.08, "mp_density=0.07", 5),
    ("dct", 2, 2, 50, "constant", 0.08, "activation_codec=int8", 5),
    *(("dense", 2, 2, 50, "cosine", rate, "", 3) for rate in (0.03, 0.045, 0.06, 0.08)),
    *(("dct", 2, 2, 50, "cosine", rate, "", 3) for rate in (0.06, 0.08, 0.12, 0.16)),
)


def train(record: Record, study: Study) -> list[Run]:
    """Makes the runs of a study that are missing, and returns all of them."""
    *setting, option, seeds = study
    runs: list[Run] = [(*study[:-1], seed) for seed in range(seeds)]
    if not all(record.rows(run) for run in runs):
        with tempfile.TemporaryDirectory() as folder:
            names = ("backend", "dp", "mp", "warmup", "schedule", "lr")
            options = {**dict(zip(names, setting, strict=True)), "seeds": seeds, "out": folder}
            flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
            flags += ["--option", option] if option else []
            call = "from dct_compile.cli.main import main; main()"
            subprocess.run([sys.executable, "-c", call, "train", *flags], check=True, stdout=subprocess.DEVNULL)
            (found,) = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))["backends"]
        for run, values in zip(runs, found["runs"], strict=True):
            record.add(run, [[values["metrics"]["auc"], values["metrics"]["log_loss"], max(values["losses"][:20])]])
    return runs


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.")
def main(results: Path) -> None:
    """Prints a table: mean and spread over the seeds, and the highest loss of the first 20 steps of all."""
    record, table = Record(results, RUN, MEASURED), []
    for study in STUDIES:
        numbers = list(zip(*(record.rows(run)[0] for run in train(record, study)), strict=True))
        auc, loss = (f"{statistics.mean(column):.4f} ± {statistics.stdev(column):.4f}" for column in numbers[:2])
        table.append([*study, auc, loss, f"{max(numbers[2]):.2f}"])
    print(circumstances())
    print(tabulate(table, [*RUN[:-1], "seeds", "test AUC", "test log-loss", "highest loss"], disable_numparse=True))


if __name__ == "__main__":
    main()
