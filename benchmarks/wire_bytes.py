"""Bytes that really leave a host per step, read from its network interface, beside what the report says.

Start it once per rank, each on a host (or network namespace) of its own, as torchrun does, with the interface in ``GLOO_SOCKET_IFNAME``.
A model of one linear layer is trained in DDP, dense and then with each scheme; TCP, IP and Ethernet headers and gloo's own messages are in
the measured figure, so it is a little more than the report's.

    torchrun ... benchmarks/wire_bytes.py [--width 1024] [--steps 50]
"""

import os
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.bench.machine import circumstances

WARMUP_STEPS = 3


class Layer(nn.Module):
    """A module of the user's own: torch.compile skips torch's own modules when DDP calls them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, width] -> [N, width]."""
        return torch.relu(self.linear(x))


def sent_bytes() -> int:
    """What this host's interface has sent since it came up."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def measure(scheme: str, width: int, steps: int) -> tuple[float, int]:
    """Bytes per step on this rank: (by the interface, by the report)."""
    torch._dynamo.reset()
    dct_compile.reset_report()
    torch.manual_seed(0)
    model = DistributedDataParallel(Layer(width))
    if scheme == "dense":
        compiled = torch.compile(model, backend="inductor")
    else:
        options: dict[str, Any] = {"gradient_scheme": scheme, "link": None}
        compiled = torch.compile(model, backend="dct", options=options)
    start = 0
    for step in range(WARMUP_STEPS + steps):
        if step == WARMUP_STEPS:
            dist.barrier()
            start = sent_bytes()
        torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
        compiled(torch.randn(16, width)).square().mean().backward()
    dist.barrier()
    return (sent_bytes() - start) / steps, dct_compile.report().wire_bytes


@click.command()
@click.option("--width", default=1024, help="The layer is width x width.")
@click.option("--steps", default=50, help="Counted steps.")
def main(width: int, steps: int) -> None:
    """Prints rank 0's bytes per step for dense, gather and owner."""
    dist.init_process_group("gloo")
    size, parameters = dist.get_world_size(), width * width + width
    rows: list[tuple[str, int, int, float]] = []
    for scheme in ("dense", "gather", "owner"):
        measured, reported = measure(scheme, width, steps)
        expected = reported or 2 * (size - 1) * parameters * 4 // size
        rows.append((scheme, round(measured), expected, measured / expected))
    if dist.get_rank() == 0:
        dense = rows[0][1]
        print(f"{parameters} float32 gradients, {size} ranks, {steps} steps; {circumstances()}")
        table = [[*row, dense / row[1]] for row in rows]
        print(tabulate(table, ["scheme", "B/step sent", "B/step by the report", "sent/report", "x fewer than dense"], floatfmt=".2f"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
