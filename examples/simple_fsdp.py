"""SimpleFSDP: parameters are DTensors, and a parametrisation gathers each of them, so the graph shows what FSDP does.

torchrun --nproc-per-node 2 examples/simple_fsdp.py
"""

from typing import Any

import torch
import torch.distributed as dist
from language import LanguageModel, fit, own_rows, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize


class Gathered(nn.Module):
    """The whole of a sharded parameter. Its gradient is averaged, and scattered to the shards."""

    def forward(self, shard: DTensor) -> Tensor:
        whole: Tensor = shard.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial("avg")])
        return whole


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards every parameter of ``model`` by its first dimension, in place."""
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))
            parametrize.register_parametrization(module, name, Gathered(), unsafe=True)


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    model = LanguageModel()
    shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return fit(torch.compile(model, backend="dct", options=options), seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
