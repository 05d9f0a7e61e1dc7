"""The price of a bypassed first moment: one step of AdamW and of SGD with and without it, on one parameter, in turns.

python benchmarks/optimizer_step.py [--numel 16777216] [--blocks 20]
"""

import time

import click
import torch
from tabulate import tabulate
from torch.optim import SGD, AdamW, Optimizer

from dct_compile.bench.machine import circumstances
from dct_compile.bench.timing import summarise
from dct_compile.optim import Bypass
from dct_compile.state.gradient_use import GradientUse

STEPS_PER_BLOCK = 3


def optimizers(parameter: torch.nn.Parameter) -> dict[str, Optimizer]:
    return {
        "AdamW, fused": AdamW([parameter], fused=True),
        "AdamW, foreach": AdamW([parameter], foreach=True),
        "SGD with momentum, fused": SGD([parameter], lr=0.1, momentum=0.9, fused=True),
    }


@click.command()
@click.option("--numel", default=2**24, help="Elements of the parameter, float32.")
@click.option("--blocks", default=20, help=f"Timed blocks of {STEPS_PER_BLOCK} steps for each variant.")
def main(numel: int, blocks: int) -> None:
    """Prints the times of a step, its first moment kept, bypassed, and bypassed with a second moment that knows the gaps."""
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.randn(numel))
    parameter.grad = torch.where(torch.rand(numel) < 0.01, torch.randn(numel), 0.0)
    use = GradientUse()
    bypass = Bypass(use, lambda optimizer, count: None)
    (record,) = use.of([parameter])
    rows = []
    for name, optimizer in optimizers(parameter).items():
        times: dict[str, list[float]] = {"kept": [], "bypassed": [], "with gaps": []}
        for block in range(blocks + 1):
            for variant, measured in times.items():
                record.waits, record.gap = variant != "kept", float("inf") if variant == "with gaps" else 0.0
                start = time.perf_counter()
                for _ in range(STEPS_PER_BLOCK):
                    optimizer.step()
                if block:  # the first one makes the state
                    measured.append((time.perf_counter() - start) / STEPS_PER_BLOCK * 1e3)
        kept, *others = (summarise(measured) for measured in times.values())
        rows.append([name, kept.median_ms, *(value for other in others for value in (other.median_ms, other.median_ms / kept.median_ms))])
    del bypass
    print(f"{numel} float32 elements, 1 % of the gradient is not zero; {circumstances()}")
    print(tabulate(rows, ["optimizer", "kept ms", "bypassed ms", "x", "with gaps ms", "x"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
