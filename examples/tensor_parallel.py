"""Tensor parallelism with DTensor: the sums of hidden states, and those of their gradients, travel as int8 rows.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import LanguageModel, fit, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = LanguageModel()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        columns = {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"feed_forward.up": ColwiseParallel()}
        parallelize_module(block, mesh, {**columns, "attention.out": RowwiseParallel(), "feed_forward.down": RowwiseParallel()})
    return fit(torch.compile(model, backend="dct", options=options), seed, steps)


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
