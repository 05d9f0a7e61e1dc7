"""GPT on text, byte by byte: AdamW, test loss per byte."""

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from dct_compile.models.gpt import GPT
from dct_compile.models.parallel import Mesh
from dct_compile.models.recipes import RECIPES, Recipe
from dct_compile.models.tasks.task import Batch, Metric, Task, over_all_ranks, own_rows
from dct_compile.models.texts import pieces, shakespeare, split_text

CONTEXT = 64
_TEST_ROWS = 64


class GptTask(Task):
    """Predicts the next byte. A sample is a piece of CONTEXT bytes; training draws pieces at random places of the training part."""

    recipe: ClassVar[Recipe] = RECIPES["gpt"]
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "test nats/byte", False),
        Metric("bits_per_byte", "test bits/byte", False),
    )

    def parts(self) -> tuple[Tensor, Tensor]:
        """Returns the training part and the test part, both uint8 [bytes]. Raises ``MissingData``, and ``ValueError`` for too few bytes."""
        text = shakespeare()
        if self.source.max_samples is not None:
            text = text[: self.source.max_samples * CONTEXT]
        train, test = split_text(text)
        if len(test) <= CONTEXT:
            raise ValueError(f"{len(text)} bytes are too few: a tenth of them, the test part, must hold more than {CONTEXT}")
        return train, test

    def samples(self, seed: int) -> int:
        return len(self.parts()[0]) // CONTEXT

    def build(self, mesh: Mesh) -> GPT:
        return GPT(context=CONTEXT)

    def epoch(self, seed: int, number: int, mesh: Mesh) -> Iterator[Batch]:
        train, _ = self.parts()
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        for _ in range(self.samples(seed) // self.batch_size):
            starts = torch.randint(0, len(train) - CONTEXT, (self.batch_size,), generator=generator)
            yield pieces(train, starts[own_rows(self.batch_size, mesh)], CONTEXT)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(*batch)
        return loss

    @torch.no_grad()
    def test(self, model: nn.Module, compiled: nn.Module, seed: int, mesh: Mesh) -> dict[str, float]:
        model.eval()
        _, test = self.parts()
        own = torch.arange(0, len(test) - CONTEXT, CONTEXT)[mesh.dp_rank :: mesh.dp]
        sums = torch.zeros(2, dtype=torch.float64)
        for starts in own.split(_TEST_ROWS):
            sums += torch.tensor([model(*pieces(test, starts, CONTEXT)).item() * len(starts), len(starts)], dtype=torch.float64)
        loss, count = over_all_ranks(sums, mesh)
        return {"loss": loss / count, "bits_per_byte": loss / count / math.log(2)}
