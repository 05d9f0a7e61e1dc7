"""Fully sharded training with compressed shards: `torchrun --nproc-per-node 2 examples/fsdp2.py`.

The ranks of this trial share one machine, where nothing would be compressed. So it assumes the link of two hosts; leave `link` out there.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dct_compile


class Layer(nn.Module):
    """A feed-forward part on a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer(64) for _ in range(2)), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
teacher, model = nn.Linear(64, 10), Classifier()
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
compiled = torch.compile(model, backend="dct", options={"link": "1Gbit/s"})
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
torch.manual_seed(dist.get_rank())
for step in range(101):
    inputs = torch.randn(64, 64)
    loss = nn.functional.cross_entropy(compiled(inputs), teacher(inputs).argmax(dim=1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 and dist.get_rank() == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")
if dist.get_rank() == 0:
    print(dct_compile.report().table(width=120))
dist.destroy_process_group()
