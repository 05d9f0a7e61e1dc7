"""The price of a bypassed first moment: steps of AdamW and of SGD with and without it, in turns, of one large parameter and of many.

All in CPU time of the one thread, which other processes of the machine disturb the least.

python benchmarks/optimizer_step.py [--numel 16777216] [--density 0.01] [--blocks 20]
"""

import time
from collections.abc import Sequence

import click
import torch
from tabulate import tabulate
from torch.optim import SGD, AdamW, Optimizer

from dct_compile.bench.machine import circumstances
from dct_compile.bench.timing import summarise
from dct_compile.optim import Bypass
from dct_compile.state.gradient_use import GradientUse
from dct_compile.triton_kernels.cpu.build import load_library

STEPS_PER_BLOCK = 3
MANY = 150


def optimizers(parameters: Sequence[torch.nn.Parameter]) -> dict[str, Optimizer]:
    return {
        "AdamW, fused": AdamW(parameters, fused=True),
        "AdamW, foreach": AdamW(parameters, foreach=True),
        "SGD with momentum, fused": SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    }


def measure(use: GradientUse, count: int, numel: int, density: float, blocks: int) -> list[list[object]]:
    """Returns a row for each optimizer, of ``count`` parameters with ``numel`` elements in all."""
    parameters = [torch.nn.Parameter(torch.randn(numel // count)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.where(torch.rand(parameter.shape) < density, torch.randn(parameter.shape), 0.0)
    rows: list[list[object]] = []
    for name, optimizer in optimizers(parameters).items():
        times: dict[str, list[float]] = {"kept": [], "bypassed": [], "with gaps": []}
        for block in range(blocks + 1):
            for variant, measured in times.items():
                for record in use.of(parameters):
                    record.waits, record.gap = variant != "kept", float("inf") if variant == "with gaps" else 0.0
                start = time.thread_time()
                for _ in range(STEPS_PER_BLOCK):
                    optimizer.step()
                if block:  # the first one makes the state
                    measured.append((time.thread_time() - start) / STEPS_PER_BLOCK * 1e3)
        kept, *others = (summarise(measured) for measured in times.values())
        ratios = [value for other in others for value in (other.median_ms, other.median_ms / kept.median_ms)]
        rows.append([name, count, kept.median_ms, *ratios])
    return rows


@click.command()
@click.option("--numel", default=2**24, help="Elements of all parameters together, float32.")
@click.option("--density", default=0.01, help="The part of the gradient that is not zero.")
@click.option("--blocks", default=20, help=f"Timed blocks of {STEPS_PER_BLOCK} steps for each variant.")
def main(numel: int, density: float, blocks: int) -> None:
    """Prints the times of a step, its first moment kept, bypassed, and bypassed with a second moment that knows the gaps."""
    torch.set_num_threads(1)
    use = GradientUse()
    bypass = Bypass(use, lambda optimizer, count: None)
    kernels = "references" if load_library() is None else "C++ kernels"
    rows = [row for count in (1, MANY) for row in measure(use, count, numel, density, blocks)]
    del bypass
    print(f"{numel} float32 elements, {density:.1%} of the gradient is not zero; CPU time of the one thread; {kernels}; {circumstances()}")
    print(tabulate(rows, ["optimizer", "parameters", "kept ms", "bypassed ms", "x", "with gaps ms", "x"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
