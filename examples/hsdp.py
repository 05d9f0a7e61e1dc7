"""Hybrid sharding (HSDP): shards within a row of the mesh, copies between the rows, whose gradients send their largest 1 %.

torchrun --nproc-per-node 4 examples/hsdp.py
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
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return fit(torch.compile(model, backend="dct", options=options), seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
