"""Tensor and data parallelism on a mesh: activations travel within a row of it, gradients of each part between the rows.

torchrun --nproc-per-node 4 examples/tensor_and_data_parallel.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import BATCH, LanguageModel, fit, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
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
    compiled = torch.compile(model, backend="dct", options={"data_parallel": mesh["dp"].get_group(), **options})
    own, place = BATCH // mesh["dp"].size(), mesh["dp"].get_local_rank()
    return fit(compiled, seed, steps, slice(place * own, (place + 1) * own))


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
