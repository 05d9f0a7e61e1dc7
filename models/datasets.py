"""Click-prediction data sets as tensors in memory, split into a training and a test part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dct_compile.models.parallel import Table
from dct_compile.models.recipes import RECIPES
from dct_compile.models.sources import RawData, criteo, flights, movielens


@dataclass(frozen=True)
class Samples:
    """``dense`` float32 [N, F], ``ids`` int64 [N, sum of widths], ``labels`` float32 [N]."""

    dense: Tensor
    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Samples":
        """Returns the samples at the positions ``index`` int64 [n]."""
        return Samples(self.dense[index], self.ids[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A split data set; the columns of ``ids`` belong to ``tables`` in order, as many each as its width."""

    name: str
    tables: tuple[Table, ...]
    train: Samples
    test: Samples

    @property
    def dense_features(self) -> int:
        """Columns of ``dense``."""
        return int(self.train.dense.shape[1])


def load(name: str, seed: int = 0, criteo_path: Path | None = None, max_samples: int | None = None) -> Dataset:
    """Returns the data set ``name``, split at random by ``seed`` (Criteo: in order of time). Files are read once per process.

    Args:
        name: One of those in the recipe of "dlrm".
        seed: The seed of the split.
        criteo_path: The file of Criteo's click log.
        max_samples: Uses the first samples only.

    Raises:
        MissingData: The files are not there (a ``FileNotFoundError``).
        ValueError: The name is unknown, a file is broken, or ``criteo`` has no ``criteo_path``.
    """
    if name == "criteo":
        if criteo_path is None:
            raise ValueError("the criteo data set needs the path of its train.txt")
        raw = criteo(criteo_path, max_samples=max_samples)
    elif name in _LOADERS:
        raw = _LOADERS[name]()
    else:
        raise ValueError(f"unknown data set {name!r}: there are {', '.join(RECIPES['dlrm'].datasets)}")
    if max_samples is not None:
        raw = RawData(raw.tables, raw.dense[:max_samples], raw.ids[:max_samples], raw.labels[:max_samples], raw.counted, raw.ordered)
    return split(name, raw, seed)


def split(name: str, raw: RawData, seed: int, test_fraction: float = 0.2) -> Dataset:
    """Splits ``raw`` into a training and a test part.

    Appends the counts of ``raw.counted`` as dense features and scales dense features, all by the training part alone.
    """
    samples = len(raw.labels)
    order = np.arange(samples) if raw.ordered else np.random.default_rng(seed).permutation(samples)
    train, test = np.split(order, [samples - round(samples * test_fraction)])
    if not len(train) or not len(test):
        raise ValueError(f"{samples} samples are too few for a training and a test part")
    counts = [_log_counts(raw.ids[:, column], train) for column in raw.counted]
    dense = np.concatenate([raw.dense, *counts], axis=1)
    mean, deviation = dense[train].mean(axis=0), dense[train].std(axis=0)
    dense = ((dense - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    everything = Samples(torch.from_numpy(dense), torch.from_numpy(raw.ids), torch.from_numpy(raw.labels))
    return Dataset(name, raw.tables, everything.take(torch.from_numpy(train)), everything.take(torch.from_numpy(test)))


def batches(samples: Samples, batch_size: int, seed: int) -> Iterator[Samples]:
    """Yields one epoch in an order given by ``seed``, in whole batches. The rest that does not fill a batch is left out."""
    for index in shuffled(len(samples), batch_size, seed):
        yield samples.take(index)


def shuffled(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields the positions 0 to ``count`` - 1 in an order given by ``seed``, int64 [batch_size] each; an incomplete batch is left out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def synthetic(samples: int = 4096) -> RawData:
    """Returns a small set with a structure to learn: three tables (one of them with two ids per sample), four dense features."""
    generator = np.random.default_rng(0)
    tables = (Table("a", 50), Table("b", 30), Table("c", 12, width=2))
    ids = np.stack([generator.zipf(1.5, samples) % rows for rows in (50, 30, 11, 11)], axis=1)
    ids[:, 2:] += 1
    dense = generator.standard_normal((samples, 4)).astype(np.float32)
    left, right = generator.standard_normal((50, 4)), generator.standard_normal((30, 4))
    score = (left[ids[:, 0]] * right[ids[:, 1]]).sum(axis=1) + dense @ np.array([1.0, -1.0, 0.5, 0.0])
    labels = generator.random(samples) < 1 / (1 + np.exp(-score))
    return RawData(tables, dense, ids.astype(np.int64), labels.astype(np.float32), counted=(0,))


def _log_counts(ids: NDArray[np.int64], train: NDArray[np.int64]) -> NDArray[np.float32]:
    counts = np.bincount(ids[train], minlength=int(ids.max()) + 1)
    return np.log1p(counts[ids]).astype(np.float32)[:, None]


_LOADERS: dict[str, Callable[[], RawData]] = {"movielens": movielens, "flights": flights, "synthetic": synthetic}
