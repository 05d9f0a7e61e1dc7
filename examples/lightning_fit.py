"""Lightning: compile the module inside of the LightningModule; the strategy "ddp" wraps the LightningModule.

`torchrun --nproc-per-node 2 examples/lightning_fit.py`. Compiling the LightningModule itself would compile ``forward``, which ``fit`` does
not call.
"""

from typing import Any

import lightning
import torch
import torch.distributed as dist
from language import LanguageModel, batches, own_rows, run
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Module(lightning.LightningModule):
    """The training of a compiled model."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = LanguageModel()
        self.model.compile(backend="dct", options=options)
        self.losses: list[Tensor] = []

    def training_step(self, tokens: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(tokens)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=6e-3, betas=(0.9, 0.95))


def train(options: dict[str, Any], steps: int = 300, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss of the last tenth of the steps, and the model."""
    torch.manual_seed(seed)
    module = Module(options)
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=dist.get_world_size(),
        strategy="ddp",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader([tokens[own_rows()] for tokens in batches(seed, steps)], batch_size=None))
    last = torch.stack(module.losses[-max(1, steps // 10) :]).mean()
    dist.all_reduce(last)
    return last.item() / dist.get_world_size(), trainer.strategy.model


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
