"""Tensor parallelism within a row of the mesh, FSDP2 between the rows: each shard of a layer is sharded again.

torchrun --nproc-per-node 4 examples/tensor_parallel_fsdp2.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import BATCH, LanguageModel, fit, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = LanguageModel()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    for block in model.blocks:
        columns = {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"feed_forward.up": ColwiseParallel()}
        plan = {**columns, "attention.out": RowwiseParallel(), "feed_forward.down": RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    own, place = BATCH // mesh["dp"].size(), mesh["dp"].get_local_rank()
    return fit(torch.compile(model, backend="dct", options=options), seed, steps, slice(place * own, (place + 1) * own))


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
