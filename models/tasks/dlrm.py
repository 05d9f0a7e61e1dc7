"""DLRM on clicks: Adagrad, test AUC and log-loss."""

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from dct_compile.models.datasets import Dataset, Samples, batches, load
from dct_compile.models.dlrm import DLRM
from dct_compile.models.metrics import auc, log_loss
from dct_compile.models.parallel import Mesh
from dct_compile.models.recipes import RECIPES, Recipe
from dct_compile.models.tasks.task import Batch, DataSource, Metric, Task, own_rows

PREVIEW_SAMPLES = 1000


class DlrmTask(Task):
    """Predicts clicks. Each seed has a split of its own, but for data in order of time."""

    recipe: ClassVar[Recipe] = RECIPES["dlrm"]
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("log_loss", "test log-loss", False), Metric("auc", "test AUC", True))

    def __init__(self, source: DataSource, batch_size: int) -> None:
        super().__init__(source, batch_size)
        self._loaded: tuple[int, Dataset] | None = None

    def data(self, seed: int) -> Dataset:
        """Returns the data set, split by ``seed``. Raises what :func:`dct_compile.models.datasets.load` raises."""
        if self._loaded is None or self._loaded[0] != seed:
            self._loaded = seed, load(self.source.name, seed, self.source.path, self.source.max_samples)
        return self._loaded[1]

    def samples(self, seed: int) -> int:
        return len(self.data(seed).train)

    def check(self, mp: int) -> None:
        name, samples = self.source.name, self.source.max_samples
        # The whole Criteo log takes minutes to read: its first lines tell whether it is one.
        preview = name == "criteo"
        data = load(name, 0, self.source.path, min(PREVIEW_SAMPLES, samples or PREVIEW_SAMPLES)) if preview else self.data(0)
        if mp > len(data.tables):
            raise ValueError(f"{mp} model-parallel ranks are more than the {len(data.tables)} tables of {name}")
        if not preview:
            super().check(mp)

    def build(self, mesh: Mesh) -> DLRM:
        data = self.data(0)
        return DLRM(data.dense_features, data.tables, mesh.mp_group)

    def reset(self, model: nn.Module, mesh: Mesh, seed: int) -> None:
        assert isinstance(model, DLRM)
        model.reset_parameters(seed)

    def epoch(self, seed: int, number: int, mesh: Mesh) -> Iterator[Batch]:
        for batch in batches(self.data(seed).train, self.batch_size, seed=seed * 1000 + number):
            own = _own(batch, mesh)
            yield own.dense, own.ids, own.labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        dense, ids, labels = batch
        return binary_cross_entropy_with_logits(model(dense, ids), labels)

    def test(self, model: nn.Module, compiled: nn.Module, seed: int, mesh: Mesh) -> dict[str, float]:
        samples = self.data(seed).test
        logits, labels = self._predict(compiled, samples, mesh).numpy(), samples.labels.numpy()
        return {"log_loss": log_loss(logits, labels), "auc": auc(logits, labels)}

    @torch.no_grad()
    def _predict(self, compiled: nn.Module, samples: Samples, mesh: Mesh) -> Tensor:
        """Logits [N] of all samples, on every rank, from the compiled model. The last batch is filled up by starting over."""
        compiled.eval()
        size = self.batch_size
        count = -(-len(samples) // size)
        order = torch.arange(count * size) % len(samples)
        parts = []
        for index in order.split(size):
            own = _own(samples.take(index), mesh)
            parts.append(compiled(own.dense, own.ids))
        own_logits = torch.stack(parts)
        gathered = [torch.empty_like(own_logits) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own_logits)
        # The ranks of one model-parallel group computed the same samples.
        return torch.cat(gathered[:: mesh.mp], dim=1).flatten()[: len(samples)]


def _own(batch: Samples, mesh: Mesh) -> Samples:
    """Returns what this rank's model-parallel group sees of a batch."""
    rows = own_rows(len(batch), mesh)
    return batch.take(torch.arange(rows.start, rows.stop))
