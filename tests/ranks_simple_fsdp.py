"""SimpleFSDP: sharded parameters as DTensors that a parametrization gathers inside of the graph, for tests that several ranks run."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize


class Gathered(nn.Module):
    """Gathers a parameter, and averages its gradient over the ranks on the way back to its shards."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, shard: DTensor) -> Tensor:
        whole = shard.to(self.dtype).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial("avg")])


def simple_fsdp(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Shards the parameters of ``model`` in place, each over all ranks of ``mesh`` by its first dimension.

    ``dtype``: the dtype that it is gathered in.
    """
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]), requires_grad=parameter.requires_grad)
            module.register_parameter(name, sharded)
            parametrize.register_parametrization(module, name, Gathered(dtype), unsafe=True)
    return model
