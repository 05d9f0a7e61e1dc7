"""Expert parallelism: each rank holds one expert. Tokens travel to it and back as int8 rows, as many as the router says.

torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from language import WIDTH, FeedForward, LanguageModel, fit, own_rows, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Experts(nn.Module):
    """A router, and this rank's expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(WIDTH, dist.get_world_size()), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, choice = self.router(rows).softmax(-1).max(-1)
        order = choice.argsort(stable=True)
        sent = torch.stack([(choice == rank).sum() for rank in range(dist.get_world_size())])
        received = funcol.all_to_all_single(sent, None, None, dist.group.WORLD)
        sizes = received.tolist(), sent.tolist()
        for size in (*sizes[0], *sizes[1]):
            torch._check(size >= 0)
            torch._check(size <= dist.get_world_size() * rows.shape[0])
        arrived = funcol.all_to_all_single_autograd(rows[order], *sizes, dist.group.WORLD)
        returned = funcol.all_to_all_single_autograd(self.expert(arrived), sizes[1], sizes[0], dist.group.WORLD)
        return (torch.zeros_like(rows).index_copy(0, order, returned) * weight.unsqueeze(1)).view(x.shape)


def train(options: dict[str, Any], steps: int = 600, seed: int = 0) -> tuple[float, nn.Module]:
    """Returns the loss at the end, and the model."""
    torch.manual_seed(seed)
    torch._dynamo.config.capture_scalar_outputs = True  # the sizes are numbers of the data
    model = LanguageModel()
    for block in model.blocks:
        block.feed_forward = Experts()
    own = [name for name, _ in model.named_parameters() if ".expert." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    compiled = torch.compile(DistributedDataParallel(model), backend="dct", options=options)
    return fit(compiled, seed, steps, own_rows())


if __name__ == "__main__":
    run(train, {"link": "1Gbit/s"})  # without it the link is measured, and ranks of one machine stay dense
