"""The collectives that a scheme calls, over one group: functional ones, which work eagerly, in a trace and in a compiled graph alike."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

c10d = torch.ops._c10d_functional

Steps = Generator[Tensor, Tensor, Tensor]
"""A function that stops where it needs the result of a collective: it yields what it has started, is sent the result, and returns its own.

So the caller decides how to wait: at once (:func:`finish`), or together with other functions (``integrations/ddp_join.py``).
"""


@dataclass(frozen=True)
class Comm:
    """Starts collectives over a group of ``size`` ranks; ``wait`` ends one.

    ``group``: the group's name. ``splits``: output and input splits of an uneven all_to_all, in rows of the first dimension; ``None`` where
    every rank gets an equal share.
    """

    group: Any
    size: int
    splits: tuple[Sequence[Any], Sequence[Any]] | None = None

    def splitting(self, rows: Any) -> "Comm":
        """Returns a Comm for inputs that have ``rows`` rows in the place of each one that ``splits`` counts."""
        if self.splits is None or rows == 1:
            return self
        received, sent = self.splits
        return replace(self, splits=([rows * split for split in received], [rows * split for split in sent]))

    def all_gather(self, x: Tensor) -> Tensor:
        """Sends ``x`` [n, ...] to all ranks. The result is [size * n, ...]."""
        gathered: Tensor = c10d.all_gather_into_tensor(x, self.size, self.group)
        return gathered

    def all_to_all(self, x: Tensor) -> Tensor:
        """Sends one share of ``x`` [n, ...] to each rank. The result holds the shares received, in order of rank."""
        even = [x.shape[0] // self.size] * self.size
        received, sent = self.splits or (even, even)
        exchanged: Tensor = c10d.all_to_all_single(x, received, sent, self.group)
        return exchanged

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Adds up ``x`` [size * n, ...] over the ranks. The result is this rank's share [n, ...] of the sum."""
        share: Tensor = c10d.reduce_scatter_tensor(x, "sum", self.size, self.group)
        return share

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Adds up ``x`` over the ranks; ``op`` "avg" divides by their number."""
        reduced: Tensor = c10d.all_reduce(x, op, self.group)
        return reduced

    def wait(self, x: Tensor) -> Tensor:
        """Waits for the collective whose result is ``x``."""
        waited: Tensor = c10d.wait_tensor(x)
        return waited


def finish(steps: Steps, comm: Comm) -> Tensor:
    """Runs ``steps`` to their end, waits for each collective at once, and returns their result."""
    try:
        started = next(steps)
        while True:
            started = steps.send(comm.wait(started))
    except StopIteration as end:
        result: Tensor = end.value
        return result


@dataclass(frozen=True)
class HostsComm(Comm):
    """Collectives over all ranks, ``inside`` this rank's host, and ``across`` hosts: over the ranks at the same place of each."""

    inside: Comm = Comm("", 1)
    across: Comm = Comm("", 1)

    @classmethod
    def planned(cls, group: Any, size: int, per_host: int) -> "HostsComm":
        """Returns the collectives of a plan, over groups inside and across hosts that are not there yet."""
        return cls(group, size, inside=Comm(f"{group} inside hosts", per_host), across=Comm(f"{group} across hosts", size // per_host))


@dataclass(frozen=True)
class DeviceComm(Comm):
    """Copies what a scheme sends to another device of this process. ``device``: that device."""

    device: torch.device = torch.device("cpu")  # noqa: RUF009

    def all_to_all(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def wait(self, x: Tensor) -> Tensor:
        return x
