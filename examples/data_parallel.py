"""Data parallelism without DDP: the graph averages the gradients of what it computes, which are compressed in place.

torchrun --nproc-per-node 2 examples/data_parallel.py
"""

from typing import Any

import torch
from language import LanguageModel, fit, own_rows, run
from torch import nn


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = LanguageModel()
    compiled = torch.compile(model, backend="dct", options={"data_parallel": True, **options})
    return fit(compiled, seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
