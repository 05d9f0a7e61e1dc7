"""Which entries of a gradient are worth their bytes: ways to choose and to write them, at equal bytes, simulated in one process.

A GPT under AdamW (0.9, 0.95) on the text of Shakespeare, or DLRM under Adam as in
`benchmarks/dlrm_adam.py`. Two simulated ranks. All runs of one seed see the same batches. The first moment is bypassed. The second one
knows gaps where the product's default says so: for the GPT, whose beta2 looks back 20 steps.

    python benchmarks/selection.py [--task gpt] [--rates 0.002,0.004,0.008] [--seeds 3] [--only int8]
"""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import click
import dlrm_adam
import torch
from simulation import Method, Simulation, density_of_int8
from tabulate import tabulate
from torch import Tensor, nn

from dct_compile.bench.machine import circumstances
from dct_compile.bench.record import Record
from dct_compile.models.datasets import load
from dct_compile.models.dlrm import DLRM
from dct_compile.models.gpt import GPT
from dct_compile.models.tasks.gpt import CONTEXT, GptTask
from dct_compile.models.texts import pieces, shakespeare, split_text

METHODS = {
    "bfloat16": Method(),
    "int8": Method(int8=True),
    "by |W| / v^(1/8)": Method(power=0.25),
    "by |W| / v^(1/4)": Method(power=0.5),
    "by |W| / v^(1/2)": Method(power=1.0),
    "tables by rows": Method(rows=("bytes.", "weights.item", "weights.user", "weights.zip")),
    "dense": Method(density=1.0),
}
RESULTS = Path(__file__).parent / "results"
RANKS, BATCH, MIN_NUMEL = 2, 8, 1000
"""Of the GPT: pieces of text for each rank and step, and the elements from which on a parameter is compressed."""


def at_equal_bytes(name: str, model: nn.Module, min_numel: int) -> Method:
    """Returns a method with the density that takes the bytes of bfloat16 values at 1 %. Rows are counted by the simulation itself."""
    method = METHODS[name]
    numels = [parameter.numel() for parameter in model.parameters() if parameter.numel() >= min_numel]
    return replace(method, density=density_of_int8(numels, method.density)) if name == "int8" else method


def batch(text: Tensor, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Draws ``rows`` pieces of the text, each with the bytes that follow."""
    return pieces(text, torch.randint(0, len(text) - CONTEXT - 1, (rows,), generator=generator), CONTEXT)


def gpt(name: str, rate: float, seed: int, steps: int) -> float:
    """Returns the test loss of a GPT in nats per byte."""
    torch.manual_seed(seed)
    net = GPT()
    optimizer, schedule = replace(GptTask.recipe.optimization, lr=rate).start(net.parameters(), steps)
    method = replace(at_equal_bytes(name, net, MIN_NUMEL), gaps=True)
    simulation = Simulation(net, optimizer, method, RANKS, MIN_NUMEL)
    train, test = split_text(shakespeare())
    generators = [torch.Generator().manual_seed(1000 * seed + rank) for rank in range(RANKS)]
    for _ in range(steps):
        simulation.step(net(*batch(train, generator, BATCH)) for generator in generators)
        schedule.step()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return statistics.mean(float(net(*batch(test, generator, 64))) for _ in range(20))


def dlrm(name: str, rate: float, seed: int, steps: int) -> float:
    """Returns 1 - test AUC of DLRM."""
    data = load("movielens", seed)
    method = at_equal_bytes(name, DLRM(data.dense_features, data.tables), dlrm_adam.MIN_NUMEL)
    epochs = math.ceil(steps * dlrm_adam.BATCH / len(data.train))
    curve = dlrm_adam.curve(method, {}, rate, seed, epochs, steps)
    return 1 - next(curve)[1]


TASKS = {"gpt": (gpt, "test_loss_nats", 1000), "dlrm": (dlrm, "one_minus_auc", 468)}


@click.command()
@click.option("--task", type=click.Choice(list(TASKS)), default="gpt", help="The model.")
@click.option("--rates", default="0.002,0.004,0.008", help="Learning rates, each tried with the first seed.")
@click.option("--seeds", default=3, help="Seeds of each method at its best learning rate.")
@click.option("--only", multiple=True, help="A method; all of them without this option.")
def main(task: str, rates: str, seeds: int, only: tuple[str, ...]) -> None:
    """Prints a table, and keeps all runs in benchmarks/results/."""
    torch.set_num_threads(1)
    train, measured, steps = TASKS[task]
    record = Record(RESULTS / f"selection_{task}.csv", dlrm_adam.RUN, [measured])
    tried = [float(rate) for rate in rates.split(",")]

    def result(*run: *tuple[str, float, int]) -> float:
        if not record.rows(run):
            record.add(run, [[train(*run, steps)]])
        return record.rows(run)[0][0]

    rows = []
    for method in only or METHODS:
        best = min(tried, key=lambda rate: result(method, rate, 0))
        losses = [result(method, best, seed) for seed in range(seeds)]
        rows.append([method, best, statistics.mean(losses), min(losses), max(losses)])
    print(f"{task}, simulated, {RANKS} ranks, {steps} steps; {circumstances()}")
    print(tabulate(rows, ["method", "best rate", measured, "least", "most"], floatfmt=".4g"))


if __name__ == "__main__":
    main()
