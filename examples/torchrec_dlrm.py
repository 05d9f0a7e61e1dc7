"""torchrec's DLRM, its tables sharded over the ranks: embeddings travel as int8 rows, the gradients of the MLPs compressed.

`torchrun --nproc-per-node 2 examples/torchrec_dlrm.py`. The trial assumes the link of two hosts; leave `link` out there.
"""

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM

import dct_compile

DENSE, FEATURES, ROWS, DIM, BATCH = 8, ["user", "item", "genre", "hour"], 500, 32, 128
dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
rank, ranks = dist.get_rank(), dist.get_world_size()

tables = [EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=ROWS, feature_names=[name]) for name in FEATURES]
embeddings = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
model = DLRM(embeddings, DENSE, dense_arch_layer_sizes=[256, DIM], over_arch_layer_sizes=[512, 256, 1])
optimizer_of_tables = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.05}
sharder = dct_compile.torchrec_sharder(EmbeddingBagCollectionSharder(fused_params=optimizer_of_tables))
planner = EmbeddingShardingPlanner(topology=Topology(world_size=ranks, compute_device="cpu"))
plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
wrapped = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])
compiled = torch.compile(wrapped, backend="dct", options={"link": "1Gbit/s"})

optimizer = torch.optim.Adagrad([p for name, p in wrapped.named_parameters() if "embedding_bags" not in name], lr=0.02)
taste = torch.randn(len(FEATURES), ROWS, generator=torch.Generator().manual_seed(1))
data = torch.Generator().manual_seed(2 + rank)
for step in range(101):
    dense, ids = torch.randn(BATCH, DENSE, generator=data), torch.randint(ROWS, (len(FEATURES), BATCH), generator=data)
    score = dense.sum(1) / 2 + taste.gather(1, ids).sum(0)
    jagged = KeyedJaggedTensor(FEATURES, ids.flatten(), lengths=torch.ones(ids.numel(), dtype=torch.int64))
    loss = nn.functional.binary_cross_entropy_with_logits(compiled(dense, jagged).squeeze(1), (score > 0).float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0 and rank == 0:
        print(f"step {step:3}: loss {loss.item():.3f}")
if rank == 0:
    print(dct_compile.report())
dist.destroy_process_group()
