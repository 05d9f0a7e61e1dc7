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
from dct_compile.state.gradient_use import GradientUse, Use
from dct_compile.triton_kernels.cpu.build import load_library

STEPS_PER_BLOCK = 3
MANY = 150
EARLY, LATE = 10, 1000
"""Numbers of the steps that are timed. From some hundred on the gradient itself stands in the place of Adam's bypassed moment."""
VARIANTS = {
    "kept": (False, 0.0, LATE),
    "bypassed, early": (True, 0.0, EARLY),
    "bypassed": (True, 0.0, LATE),
    "with gaps": (True, float("inf"), LATE),
}
"""Whether the first moment is bypassed, the steps that an element waits as far as the second moment knows, and the number of the step."""


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
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for block in range(blocks + 1):
            for variant, (waits, gap, number) in VARIANTS.items():
                records = use.of(parameters)
                for record in records:
                    record.waits, record.gap = waits, gap
                for state in optimizer.state.values():
                    if "step" in state:
                        state["step"].fill_(number)
                spent = [_step_s(optimizer, records) for _ in range(STEPS_PER_BLOCK)]
                if block:  # the first one makes the state
                    times[variant].append(sum(spent[1:]) / len(spent[1:]) * 1e3)  # a first late step sets the moment once more
        kept, *others = (summarise(measured) for measured in times.values())
        ratios = [value for other in others for value in (other.median_ms, other.median_ms / kept.median_ms)]
        rows.append([name, count, kept.median_ms, *ratios])
    return rows


def _step_s(optimizer: Optimizer, records: Sequence[Use]) -> float:
    """Returns the CPU seconds of a step with gradients that have been exchanged."""
    for record in records:
        record.exchanged = True
    start = time.thread_time()
    optimizer.step()
    return time.thread_time() - start


@click.command()
@click.option("--numel", default=2**24, help="Elements of all parameters together, float32.")
@click.option("--density", default=0.01, help="The part of the gradient that is not zero.")
@click.option("--blocks", default=20, help=f"Blocks of {STEPS_PER_BLOCK} steps for each variant, all but the first of which are timed.")
def main(numel: int, density: float, blocks: int) -> None:
    """Prints the times of a step, its first moment kept, bypassed, and bypassed with a second moment that knows the gaps."""
    torch.set_num_threads(1)
    use = GradientUse()
    bypass = Bypass(use, lambda optimizer, count: None)
    kernels = "references" if load_library() is None else "C++ kernels"
    rows = [row for count in (1, MANY) for row in measure(use, count, numel, density, blocks)]
    del bypass
    print(f"{numel} float32 elements, {density:.1%} of the gradient is not zero; CPU time of the one thread; {kernels}; {circumstances()}")
    print(
        tabulate(
            rows,
            ["optimizer", "parameters", "kept ms", *(head for name in list(VARIANTS)[1:] for head in (f"{name} ms", "x"))],
            floatfmt=".2f",
        )
    )


if __name__ == "__main__":
    main()
