"""Fully sharded data parallelism (FSDP2): parameters and gradients travel as int8 blocks, the optimizer's shards stay exact.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import LanguageModel, fit, own_rows, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = LanguageModel()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return fit(torch.compile(model, backend="dct", options=options), seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
