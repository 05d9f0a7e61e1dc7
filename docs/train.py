"""Data-parallel training with compressed gradients: `torchrun --nproc-per-node 2 docs/train.py`.

The ranks of this trial share one machine, where nothing would be compressed. So it assumes the link of two hosts; leave `link` out there.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Classifier(nn.Module):
    """A small multi-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of ``x`` [B, 64]."""
        return self.layers(x)


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
teacher = nn.Linear(64, 10)
model = DistributedDataParallel(Classifier())
compiled = torch.compile(model, backend="dct", options={"dp_density": 0.01, "link": "1Gbit/s"})
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02)
torch.manual_seed(dist.get_rank())
for step in range(301):
    inputs = torch.randn(128, 64)
    loss = nn.functional.cross_entropy(compiled(inputs), teacher(inputs).argmax(dim=1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 and dist.get_rank() == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")
dist.destroy_process_group()
