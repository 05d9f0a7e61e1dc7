"""torchrec's DLRM with several codecs for its sharded embeddings: test loss and bytes, of each seed.

`torchrun --nproc-per-node 2 benchmarks/recommenders.py --seeds 3 --steps 600`. `--sharding row` shards the tables row-wise. Needs torchrec
and fbgemm. The data are random ids with a hidden score; embeddings decide most of it. The MLPs are data parallel; "dct" compresses their
gradients as well.
"""

import argparse
from dataclasses import dataclass
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import sharding_plan as plans
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM

import dct_compile
from dct_compile.bench.sockets import sent_bytes

DENSE, FEATURES, ROWS, DIM, BATCH = 8, 4, 500, 32, 128
NAMES = [f"f{index}" for index in range(FEATURES)]
TASTE = torch.randn(FEATURES, ROWS, generator=torch.Generator().manual_seed(1))
FBGEMM = {"fbgemm fp16": CommType.FP16, "fbgemm int8": CommType.INT8}
METHODS = ("dense", *FBGEMM, "int8 rows", "int4 rows", "dct")


@dataclass(frozen=True)
class Outcome:
    """``loss``: on the test samples. ``sent``: bytes of a step on this rank's sockets. ``seconds``: of a step."""

    loss: float
    sent: float
    seconds: float


def sharder_of(method: str) -> Any:
    """Returns the sharder of a method."""
    fused = {"optimizer": EmbOptimType.EXACT_ADAGRAD, "learning_rate": 0.05}
    if method in FBGEMM:
        config = QCommsConfig(forward_precision=FBGEMM[method], backward_precision=FBGEMM[method])
        codecs = get_qcomm_codecs_registry(config, device=torch.device("cpu"))
        return EmbeddingBagCollectionSharder(fused_params=fused, qcomm_codecs_registry=codecs)
    sharder = EmbeddingBagCollectionSharder(fused_params=fused)
    return sharder if method == "dense" else dct_compile.torchrec_sharder(sharder, bits=4 if method == "int4 rows" else 8)


def model_of(method: str, seed: int, sharding: str) -> Any:
    """Returns the model under DistributedModelParallel."""
    torch.manual_seed(seed)
    tables = [EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=ROWS, feature_names=[name]) for name in NAMES]
    embeddings, sharder, ranks = (
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        sharder_of(method),
        dist.get_world_size(),
    )
    model = DLRM(embeddings, DENSE, dense_arch_layer_sizes=[256, DIM], over_arch_layer_sizes=[512, 256, 1])
    by_table = [plans.table_wise(rank=index % ranks, compute_kernel="fused") for index in range(FEATURES)]
    by_row = [plans.row_wise(compute_kernel="fused") for _ in NAMES]
    placed = {f"t_{name}": way for name, way in zip(NAMES, by_row if sharding == "row" else by_table, strict=True)}
    plan = plans.construct_module_sharding_plan(embeddings, placed, sharder, ranks, ranks, "cpu")
    where = {"sparse_arch.embedding_bag_collection": plan}
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=ShardingPlan(where), sharders=[sharder])


def samples(generator: torch.Generator) -> tuple[Tensor, KeyedJaggedTensor, Tensor]:
    """Returns numbers [BATCH, DENSE], ids and labels [BATCH]."""
    dense, ids = torch.randn(BATCH, DENSE, generator=generator), torch.randint(ROWS, (FEATURES, BATCH), generator=generator)
    chance = torch.sigmoid(dense.sum(1) / 2 + 2 * TASTE.gather(1, ids).sum(0))
    jagged = KeyedJaggedTensor(NAMES, ids.flatten(), lengths=torch.ones(ids.numel(), dtype=torch.int64))
    return dense, jagged, torch.bernoulli(chance, generator=generator)


def loss_of(model: Any, dense: Tensor, ids: KeyedJaggedTensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model(dense, ids).squeeze(1), labels)


def train(method: str, seed: int, steps: int, sharding: str) -> Outcome:
    """Trains a model and tests it."""
    model = model_of(method, seed, sharding)
    run = torch.compile(model, backend="dct", options={"link": "1Gbit/s"}) if method == "dct" else model
    optimizer = torch.optim.Adagrad([item for name, item in model.named_parameters() if "embedding_bags" not in name], lr=0.02)
    data = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    for step in range(steps):
        if step == 50:
            dist.barrier()
            before, start = sent_bytes(), perf_counter()
        loss = loss_of(run, *samples(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds, sent = (perf_counter() - start) / (steps - 50), (sent_bytes() - before) / (steps - 50)
    tested = torch.Generator().manual_seed(7 + dist.get_rank())
    with torch.no_grad():
        losses = torch.tensor([loss_of(model, *samples(tested)) for _ in range(100)]).mean()
    dist.all_reduce(losses)
    return Outcome(losses.item() / dist.get_world_size(), sent, seconds)


def main() -> None:
    """Prints a table: mean and spread over the seeds, and the difference from the first method, seed by seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="the first is compared with")
    parser.add_argument("--sharding", choices=("table", "row"), default="table")
    chosen = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    reference: list[float] = []
    for method in chosen.methods:
        outcomes = [train(method, seed, chosen.steps, chosen.sharding) for seed in range(chosen.seeds)]
        losses = [outcome.loss for outcome in outcomes]
        reference = reference or losses
        apart = [loss - before for loss, before in zip(losses, reference, strict=True)]
        if dist.get_rank() == 0:
            spread = f"{mean(losses):.4f} ± {stdev(losses):.4f} | {mean(apart):+.4f} ± {stdev(apart):.4f}"
            print(
                f"| {method} | {mean(o.sent for o in outcomes):,.0f} | {spread} | {1e3 * mean(o.seconds for o in outcomes):.1f} |",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
