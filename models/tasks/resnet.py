"""ResNet on small images: SGD with momentum, test accuracy and loss."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dct_compile.models.datasets import shuffled
from dct_compile.models.images import Images, fashion_mnist, normalized, shifted
from dct_compile.models.parallel import Mesh
from dct_compile.models.recipes import FASHION_MNIST, RECIPES, Recipe
from dct_compile.models.resnet import ResNet
from dct_compile.models.tasks.task import Batch, Metric, Task, equal_buffers, over_all_ranks, own_rows

SHIFT = 2
"""Pixels that an image moves at most, each way, in training."""
_TEST_ROWS = 100


class ResnetTask(Task):
    """Classifies images of 28 x 28 pixels. ``max_samples`` limits the training part, and the test part to a sixth of that."""

    recipe: ClassVar[Recipe] = RECIPES["resnet"]
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("accuracy", "test accuracy", True), Metric("loss", "test loss", False))

    def parts(self) -> tuple[Images, Images]:
        """Returns the training part and the test part. Raises what :func:`dct_compile.models.images.fashion_mnist` raises."""
        train, test = fashion_mnist(self.source.path or FASHION_MNIST)
        samples = self.source.max_samples
        if samples is None:
            return train, test
        fewer = max(1, samples // 6)
        return Images(train.pixels[:samples], train.labels[:samples]), Images(test.pixels[:fewer], test.labels[:fewer])

    def samples(self, seed: int) -> int:
        return len(self.parts()[0])

    def build(self, mesh: Mesh) -> ResNet:
        return ResNet()

    def epoch(self, seed: int, number: int, mesh: Mesh) -> Iterator[Batch]:
        train, _ = self.parts()
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        rows = own_rows(self.batch_size, mesh)
        for index in shuffled(len(train), self.batch_size, seed=seed * 1000 + number):
            down, right = torch.randint(-SHIFT, SHIFT + 1, (2, self.batch_size), generator=generator)
            flipped = torch.rand(self.batch_size, generator=generator) < 0.5
            pixels = shifted(train.pixels[index[rows]], down[rows], right[rows], flipped[rows])
            yield normalized(pixels), train.labels[index[rows]]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(model(images), labels)

    @torch.no_grad()
    def test(self, model: nn.Module, compiled: nn.Module, seed: int, mesh: Mesh) -> dict[str, float]:
        model.eval()
        equal_buffers(model, mesh)
        _, test = self.parts()
        sums = torch.zeros(3, dtype=torch.float64)
        for index in torch.arange(len(test))[mesh.dp_rank :: mesh.dp].split(_TEST_ROWS):
            labels = test.labels[index]
            logits = model(normalized(test.pixels[index]))
            right, loss = (logits.argmax(1) == labels).sum(), cross_entropy(logits, labels, reduction="sum")
            sums += torch.tensor([right.item(), loss.item(), len(index)], dtype=torch.float64)
        correct, total, count = over_all_ranks(sums, mesh)
        return {"accuracy": correct / count, "loss": total / count}
