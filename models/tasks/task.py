"""A task: a model, the data that it learns from, its loss and its test."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dct_compile.models.parallel import Mesh
from dct_compile.models.recipes import Recipe

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Metric:
    """A number of the test: its ``name``, its ``title`` in tables, and its direction."""

    name: str
    title: str
    higher_is_better: bool


@dataclass(frozen=True)
class DataSource:
    """A data set: its ``name``, the ``path`` of its files where that is not known, and how many of its first samples are used (all)."""

    name: str
    path: Path | None = None
    max_samples: int | None = None


class Task(ABC):
    """A model and its data. All methods that train it with the same seed start from the same parameters and see the same batches.

    A batch is shared by the data-parallel ranks of a mesh: each of them sees its own rows.

    Args:
        source: The data set. Nothing is read before it is needed.
        batch_size: Samples per step, over all ranks.
    """

    recipe: ClassVar[Recipe]
    metrics: ClassVar[tuple[Metric, ...]]

    def __init__(self, source: DataSource, batch_size: int) -> None:
        self.source, self.batch_size = source, batch_size

    @abstractmethod
    def samples(self, seed: int) -> int:
        """Returns the number of training samples. Raises ``MissingData`` or ``ValueError`` for data that cannot be read."""

    def check(self, mp: int) -> None:
        """Raises ``ValueError`` for data that does not fit the batches or ``mp`` model-parallel ranks, and what :meth:`samples` raises."""
        samples = self.samples(0)
        if samples < self.batch_size:
            raise ValueError(f"a batch of {self.batch_size} is larger than the training part of {self.source.name} ({samples} samples)")

    def steps(self, seed: int, epochs: int) -> int:
        """Returns the number of steps of ``epochs`` epochs. What does not fill a batch is left out of an epoch."""
        return self.samples(seed) // self.batch_size * epochs

    @abstractmethod
    def build(self, mesh: Mesh) -> nn.Module:
        """Returns the model, not wrapped, with parameters of the global seed of torch."""

    def reset(self, model: nn.Module, mesh: Mesh, seed: int) -> None:
        """Sets parameters and buffers of ``model`` in place to those of ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.load_state_dict(self.build(mesh).state_dict())

    def batches(self, seed: int, steps: int, mesh: Mesh) -> Iterator[Batch]:
        """Yields this rank's rows of ``steps`` batches."""
        return islice(chain.from_iterable(self.epoch(seed, number, mesh) for number in count()), steps)

    @abstractmethod
    def epoch(self, seed: int, number: int, mesh: Mesh) -> Iterator[Batch]:
        """Yields this rank's rows of the batches of epoch ``number``, in whole batches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean loss of ``batch``, a scalar, with its graph. ``model`` may be wrapped and compiled."""

    @abstractmethod
    def test(self, model: nn.Module, compiled: nn.Module, seed: int, mesh: Mesh) -> dict[str, float]:
        """Returns each of ``metrics`` over the whole test part, the same on all ranks. A collective of all ranks.

        Args:
            model: The plain model. It is left in evaluation mode.
            compiled: The same model, wrapped and compiled. A model whose forward communicates is tested as it was trained.
            seed: The seed of the training.
            mesh: The ranks.
        """


def own_rows(batch_size: int, mesh: Mesh) -> slice:
    """Returns the rows of a batch that this rank sees."""
    rows = batch_size // mesh.dp
    return slice(mesh.dp_rank * rows, (mesh.dp_rank + 1) * rows)


def over_all_ranks(sums: Tensor, mesh: Mesh) -> list[float]:
    """Adds up ``sums`` float64 [n] of the data-parallel ranks of a mesh with ``mp`` 1."""
    if mesh.dp_group is not None:
        dist.all_reduce(sums, group=mesh.dp_group)
    return sums.tolist()


def equal_buffers(model: nn.Module, mesh: Mesh) -> None:
    """Gives all data-parallel ranks the buffers of the first: each has seen other samples since DDP last did so."""
    if mesh.dp_group is not None:
        for buffer in model.buffers():
            dist.broadcast(buffer, group=mesh.dp_group, group_src=0)
