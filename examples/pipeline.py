"""A transformer cut into pipeline stages that send int8 rows: `torchrun --nproc-per-node 2 examples/pipeline.py`.

The ranks of this trial share one machine, where nothing would be compressed. So it assumes the link of two hosts; leave `link` out there.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import dct_compile

VOCABULARY, LENGTH, WIDTH, BATCH, MICROBATCHES = 64, 32, 128, 32, 4


class Stage(nn.Module):
    """One block of a transformer; the first stage embeds the tokens, the last one returns logits."""

    def __init__(self, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH) if is_first else nn.Identity()
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY) if is_last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T] or hidden states [B, T, W] to hidden states or logits [B, T, V]."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.block(self.embed(x), src_mask=mask, is_causal=True))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of logits [B, T, V]."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, stages = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
module = Stage(rank == 0, rank == stages - 1)
compiled = torch.compile(module, backend="dct", options={"link": "1Gbit/s"})
schedule = Schedule1F1B(PipelineStage(compiled, rank, stages, torch.device("cpu")), MICROBATCHES, loss_fn=loss_of)
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)  # all ranks draw the same tokens
for step in range(61):
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    tokens = (first + 3 * torch.arange(LENGTH + 1)) % VOCABULARY  # each token follows from the one before
    losses: list[Tensor] = []
    schedule.step(*[tokens[:, :-1]] * (rank == 0), target=tokens[:, 1:], losses=losses)
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 and rank == stages - 1:
        print(f"step {step:2}: loss {torch.stack(losses).mean().item():.3f}", flush=True)
print(f"rank {rank}: {dct_compile.report()}", flush=True)
dist.destroy_process_group()
