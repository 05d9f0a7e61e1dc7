"""The density that thresholds achieve between two choices, with and without option ``hold_density``.

::

    python benchmarks/held_density.py [--numel 4194304] [--steps 1000] [--schemes gather,owner]

The gradients of two ranks are a part that stays from step to step, noise, and a scale for each element; all fade as in a training. The
density of "gather" is that of rank 0's payload, that of "owner" the one of the sum that rank 0 owns. The first 50 steps do not count.
"""

import argparse
from statistics import mean, pstdev

import torch
from torch import Tensor

from dct_compile.config import DCTConfig
from dct_compile.ops import repack, select_threshold, threshold_pack
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.layout import COUNTERS, GradientLayout, Selection, choose_block
from dct_compile.triton_kernels.schedule import is_refresh_step

CONFIG = DCTConfig()
RANKS = 2
SKIPPED = 50
State = tuple[Tensor, Tensor, Tensor]


def layout_of(numel: int, chunks: int, chunk: int) -> GradientLayout:
    """Returns the geometry that the default options give a parameter of ``numel`` elements."""
    density = CONFIG.dp_density
    block = choose_block(density, numel)
    return GradientLayout(((0, numel),), block, chunks, chunk, density * CONFIG.capacity_factor, CONFIG.dp_dtype)


def state_of(layout: GradientLayout) -> State:
    """Returns the state of a fresh bucket."""
    return torch.zeros(layout.state_numel), torch.full((1,), torch.inf), torch.zeros(1, COUNTERS, dtype=torch.int64)


class Gradients:
    """The gradients of one step after the other, and of one rank after the other."""

    def __init__(self, numel: int) -> None:
        self.numel, self.random = numel, torch.Generator().manual_seed(1)
        self.noise = torch.randn(2 * numel, generator=self.random)
        self.scale = torch.randn(numel, generator=self.random).exp()
        self.drift = torch.zeros(numel)

    def _part(self) -> Tensor:
        start = int(torch.randint(self.numel, (1,), generator=self.random))
        return self.noise[start : start + self.numel]

    def of_step(self, step: int) -> list[Tensor]:
        """Returns the gradient of each rank."""
        self.drift.mul_(0.98).add_(self._part(), alpha=0.2)
        fade = (1 + step / 200) ** -0.5
        return [(self._part() + self.drift).mul_(self.scale).mul_(fade) for _ in range(RANKS)]


def measure(scheme: str, numel: int, steps: int, hold: bool, warmup: str) -> str:
    """Trains nothing for ``steps`` steps; returns a row of the table."""
    chunks = RANKS if scheme == "owner" else 1
    layout, owned = layout_of(numel, chunks, -1), layout_of(numel, chunks, 0)
    selection = Selection(CONFIG.dp_density, "exact", 0.0, CONFIG.refresh_interval, warmup, hold)
    states, owner = [state_of(layout) for _ in range(chunks)], state_of(owned)
    counters = owner[2] if scheme == "owner" else states[0][2]
    gradients, kept, choices = Gradients(numel), [0], 0
    for step in range(steps):
        now, _, _, overflow, last = counters[0].tolist()
        choices += is_refresh_step(now, CONFIG.refresh_interval, warmup, overflow > (last if hold else 0))
        sent = []
        for gradient, state in zip(gradients.of_step(step), states, strict=False):
            select_threshold(gradient, *state, layout, selection, True)
            sent.append(threshold_pack(gradient, *state, layout, True)[: layout.chunk_bytes])
        if scheme == "owner":
            repack(torch.cat(sent), *owner, owned, selection, True)
        kept.append(int(counters[0, 1]))
    size = owned.state_numel if scheme == "owner" else numel
    found = [(after - before) / size for before, after in zip(kept[SKIPPED:-1], kept[SKIPPED + 1 :], strict=True)]
    numbers = " | ".join(f"{number:.5f}" for number in (mean(found), min(found), max(found), pstdev(found)))
    return f"| {scheme} | {warmup} | {hold} | {numbers} | {choices} |"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 22)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--schemes", default="gather,owner")
    parser.add_argument("--warmups", default="geometric,off")
    arguments = parser.parse_args()
    load_library()
    print("| scheme | warm-up | held | mean | min | max | deviation | choices |\n|---|---|---|---|---|---|---|---|")
    for scheme in arguments.schemes.split(","):
        for warmup in arguments.warmups.split(","):
            for hold in (False, True):
                print(measure(scheme, arguments.numel, arguments.steps, hold, warmup), flush=True)


if __name__ == "__main__":
    main()
