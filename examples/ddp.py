"""Data parallelism with DDP: a gradient sends its largest 1 % per step, and what is left is added to the next one.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from typing import Any

import torch
from language import LanguageModel, fit, own_rows, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(LanguageModel())
    return fit(torch.compile(model, backend="dct", options=options), seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
