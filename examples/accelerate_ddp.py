"""Accelerate: compile the model, and let ``prepare`` put DDP around it.

`torchrun --nproc-per-node 2 examples/accelerate_ddp.py`, or ``accelerate launch``. ``TorchDynamoPlugin(backend="dct")`` is refused by
accelerate, which knows its own list of backends.
"""

from typing import Any

import torch
from accelerate import Accelerator
from language import LanguageModel, batches, own_rows, run
from torch import nn


def train(options: dict[str, Any], steps: int = 300, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss of the last tenth of the steps, and the model."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = LanguageModel()
    model.compile(backend="dct", options=options)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.95)))
    losses = []
    for tokens in batches(seed, steps):
        loss = wrapped(tokens[own_rows()].to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last), wrapped


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
