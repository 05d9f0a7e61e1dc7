"""Sequence parallelism with DTensor: between the layers each rank holds a part of the sequence; hidden states travel as int8 rows.

torchrun --nproc-per-node 2 examples/sequence_parallel.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import LanguageModel, fit, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = LanguageModel()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gathered = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    rows = RowwiseParallel(output_layouts=Shard(1))
    for block in model.blocks:
        columns = {f"attention.{name}": ColwiseParallel() for name in "qkv"} | {"feed_forward.up": ColwiseParallel()}
        norms = {"attention_norm": SequenceParallel(), "forward_norm": SequenceParallel()}
        inputs = {"attention": gathered, "feed_forward": gathered}
        parallelize_module(block, mesh, {**inputs, **norms, **columns, "attention.out": rows, "feed_forward.down": rows})
    # The first block gets what all ranks have; the last norm wants all of the sequence again.
    split = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
    parallelize_module(model.blocks[0], mesh, split)
    whole = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)
    parallelize_module(model.norm, mesh, whole)
    return fit(torch.compile(model, backend="dct", options=options), seed, steps)


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
