"""Candidates that find no room in their owner's share of the payload: shares of one run against units in turn, in plain PyTorch.

Each geometry sees the same gradients, and keeps a residual of its own. The threshold is the exact one of each step.

    python benchmarks/shares.py [--steps 200] [--density 0.01] [--capacity-factor 1.1]
"""

from collections.abc import Callable, Iterator
from math import ceil

import click
import torch
from selection import BATCH, MIN_NUMEL, batch
from tabulate import tabulate
from torch import Tensor

from dct_compile.models.gpt import GPT
from dct_compile.models.texts import shakespeare
from dct_compile.triton_kernels.shares import TURN

UNITS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "one run": lambda numel, owners: (ceil(ceil(numel / 256) / owners) * 256, 0),
    "4096 in turn": lambda numel, owners: (4096, 0),
    "256 in turn": lambda numel, owners: (256, 0),
    "64 in turn": lambda numel, owners: (64, 0),
    "256, turned after 16": lambda numel, owners: (256, 16),
}
"""Elements that lie together, and rounds after which the owners turn (0: never). The last row is `shares.py` of the kernels."""
OWNERS = (2, 4, 8)


def gpt_gradients(steps: int) -> Iterator[dict[str, Tensor]]:
    """Yields the gradients of a small GPT in training on real text, without those of small parameters."""
    torch.manual_seed(0)
    net, text, generator = GPT(), shakespeare(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.004, betas=(0.9, 0.99))
    for _ in range(steps):
        net(*batch(text, generator, BATCH)).backward()
        yield {name: p.grad.flatten().clone() for name, p in net.named_parameters() if p.grad is not None and p.numel() >= MIN_NUMEL}
        optimizer.step()
        optimizer.zero_grad()


def zipf_gradients(steps: int, rows: int = 20_000, width: int = 16, draws: int = 2048) -> Iterator[dict[str, Tensor]]:
    """Yields the gradients of an embedding whose rows, sorted by frequency, are drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    law = 1 / torch.arange(1, rows + 1, dtype=torch.float64)
    for _ in range(steps):
        drawn = torch.multinomial(law, draws, replacement=True, generator=generator)
        gradient = torch.zeros(rows, width).index_add_(0, drawn, torch.randn(draws, width, generator=generator))
        yield {"zipf": gradient.flatten()}


def column_gradients(steps: int, rows: int = 512, width: int = 1024) -> Iterator[dict[str, Tensor]]:
    """Yields the gradients of a matrix whose inputs have unequal magnitudes: neighbouring columns are alike."""
    generator = torch.Generator().manual_seed(0)
    scale = 1 + 3 * torch.arange(width).div(width).mul(6.28).sin().clamp(min=0)
    for _ in range(steps):
        yield {"columns": (torch.randn(rows, width, generator=generator) * scale).flatten()}


def owners_of(numel: int, geometry: str, owners: int) -> Tensor:
    """Returns the owner of each element."""
    unit, rounds = UNITS[geometry](numel, owners)
    number = torch.arange(numel) // unit
    turn = (number // owners // rounds * TURN & 0xFFFF) * owners >> 16 if rounds else 0
    return (number - turn) % owners


def step_of(w: Tensor, owner: Tensor, owners: int, step: int, density: float, factor: float) -> tuple[int, int]:
    """Takes what is sent out of ``w`` = gradient + residual. Returns the candidates, and how many of them find no room."""
    threshold = w.abs().topk(ceil(density * w.numel()), sorted=False).values.min()
    candidates = (w.abs() >= threshold) & (w != 0)
    overflow = 0
    for share in range(owners):
        found = (candidates & (owner == share)).nonzero().view(-1)
        capacity = ceil(density * factor * int((owner == share).sum()))
        overflow += max(len(found) - capacity, 0)
        w[found.roll(-step * capacity)[:capacity]] = 0
    return int(candidates.sum()), overflow


def measure(
    gradients: Callable[[int], Iterator[dict[str, Tensor]]], steps: int, density: float, factor: float
) -> dict[tuple[str, str, int], tuple[int, int]]:
    """Returns candidates and overflow over all steps, by parameter, geometry and number of owners."""
    residuals: dict[tuple[str, str, int], Tensor] = {}
    shares: dict[tuple[str, str, int], Tensor] = {}
    found: dict[tuple[str, str, int], tuple[int, int]] = {}
    for step, given in enumerate(gradients(steps)):
        for name, gradient in given.items():
            for geometry in UNITS:
                for owners in OWNERS:
                    key = name, geometry, owners
                    if key not in residuals:
                        residuals[key], shares[key], found[key] = gradient.clone(), owners_of(len(gradient), geometry, owners), (0, 0)
                    else:
                        residuals[key] += gradient
                    candidates, overflow = step_of(residuals[key], shares[key], owners, step, density, factor)
                    found[key] = found[key][0] + candidates, found[key][1] + overflow
    return found


@click.command()
@click.option("--steps", default=200, help="Steps of training.")
@click.option("--density", default=0.01, help="The fraction of elements above the threshold.")
@click.option("--capacity-factor", default=1.1, help="Room of a share, in units of the density.")
def main(steps: int, density: float, capacity_factor: float) -> None:
    """Prints the fraction of candidates that overflow, in percent."""
    torch.set_num_threads(1)
    rows = []
    for gradients in (gpt_gradients, zipf_gradients, column_gradients):
        found = measure(gradients, steps, density, capacity_factor)
        names = list(dict.fromkeys(name for name, _, _ in found))
        for owners in OWNERS:
            for name in ["all of the GPT", *names] if len(names) > 1 else names:
                row: list[object] = [name, owners]
                for geometry in UNITS:
                    chosen = [found[other, geometry, owners] for other in (names if name.startswith("all") else [name])]
                    row.append(100 * sum(over for _, over in chosen) / sum(candidates for candidates, _ in chosen))
                rows.append(row)
    print(tabulate(rows, ["parameter", "owners", *UNITS], floatfmt=".1f"))


if __name__ == "__main__":
    main()
