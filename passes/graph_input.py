"""Describes the inputs of a Dynamo graph, and how its parameters lie over the ranks."""

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Spread:
    """The distribution of a parameter over the ranks that average gradients.

    ``manager``: who distributes it over ranks, "DTensor" or "FSDP"; empty for a plain tensor, which counts as a copy, as with DDP.
    ``is_copy``: whether every rank of the group holds the same part of it. ``crossed``: the dimensions of its mesh along which the ranks of
    the group lie.
    """

    manager: str = ""
    is_copy: bool = True
    crossed: tuple[int, ...] = ()


PLAIN = Spread()


@dataclass(frozen=True)
class GraphInput:
    """One input of a Dynamo graph.

    ``dtype``, ``shape``, ``device``: of a tensor, on this rank. ``is_parameter``: True for a parameter. ``is_trainable``: True for a
    parameter that needs a gradient. ``is_foreign``: True if another part of the model computed it.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    is_parameter: bool
    is_trainable: bool
    is_foreign: bool
    device: torch.device | None = None
    spread: Spread = PLAIN

    @property
    def is_averaged(self) -> bool:
        """Whether ``data_parallel`` averages its gradient."""
        return self.is_trainable and self.spread.is_copy

    @property
    def size(self) -> int:
        """Bytes of the tensor on this rank, 0 for anything else."""
        return prod(self.shape) * self.dtype.itemsize if self.dtype is not None else 0
