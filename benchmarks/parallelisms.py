"""What each parallelism sends and learns, dense and compressed: trains the examples over seeds, and counts the bytes on the sockets.

Both trainings of a seed start from the same parameters and see the same batches. All ranks run on this machine, over loopback.

    python benchmarks/parallelisms.py [--steps 1000] [--seeds 3] [--only "ddp;fsdp2"]
"""

import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch.multiprocessing.spawn import spawn

import dct_compile
from dct_compile.bench.machine import circumstances
from dct_compile.bench.record import Record, Run
from dct_compile.bench.sockets import sent_bytes
from dct_compile.options import DENSE

EXAMPLES = Path(__file__).parent.parent / "examples"

METHODS: dict[str, Mapping[str, Any]] = {"dense": DENSE, "dct": {}, "threshold": {"activation_codec": "threshold"}}
RANKS = {
    "ddp": 2,
    "data_parallel": 2,
    "fsdp2": 2,
    "simple_fsdp": 2,
    "hsdp": 4,
    "tensor_parallel_fsdp2": 4,
    "tensor_parallel": 2,
    "sequence_parallel": 2,
    "tensor_and_data_parallel": 4,
    "expert_parallel": 2,
    "context_parallel": 2,
    "pipeline": 2,
    "contrastive": 2,
    "dlrm_all_to_all": 2,
}
"""Ranks of each example."""
RUN, MEASURED = ("example", "ranks", "steps", "method", "seed"), ("loss", "bytes_per_step")
RESULTS = Path(__file__).parent / "results" / "parallelisms.csv"


def plain_all_to_all(*tensors: Any, width: int, **settings: Any) -> Any:
    """Sends as it is what an example of ``dct_compile.all_to_all_single`` encodes."""
    return dist.all_to_all_single(*tensors, **settings)


def _rank(rank: int, folder: str, path: Path, runs: list[Run]) -> None:
    os.environ.setdefault("TORCH_LOGS", "-dynamo")
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    ranks = int(runs[0][1])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for name, _, steps, method, seed in runs:
        torch._dynamo.reset()
        dct_compile.reset_report()
        dist.barrier()
        start = sent_bytes()
        with patch("dct_compile.all_to_all_single", plain_all_to_all) if method == "dense" else nullcontext():
            loss, _ = import_module(str(name)).train({"link": None, **METHODS[str(method)]}, steps, seed)
        sent = torch.tensor(float(sent_bytes() - start))
        dist.all_reduce(sent)
        if rank == 0:
            Record(path, RUN, MEASURED).add((name, ranks, steps, method, seed), [[loss, sent.item() / ranks / int(steps)]])
    dist.barrier()
    dist.destroy_process_group()


def train_all(record: Record, name: str, method: str, steps: int, seeds: int) -> None:
    """Does those trainings of an example that are not in ``record`` yet."""
    runs: list[Run] = [(name, RANKS[name], steps, item, seed) for seed in range(seeds) for item in ("dense", method)]
    missing = [run for run in runs if not record.rows(run)]
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_rank, (folder, record.path, missing), nprocs=RANKS[name])


def row(record: Record, name: str, method: str, steps: int, seeds: int) -> list[str]:
    """Returns the table's row: bytes, their ratio, losses, and the difference of each pair."""
    both = [[record.rows((name, RANKS[name], steps, item, seed))[0] for seed in range(seeds)] for item in ("dense", method)]
    dense, other = ([rows[0] for rows in found] for found in both)
    sent, less = (statistics.mean(rows[1] for rows in found) for found in both)
    apart = [one - two for one, two in zip(other, dense, strict=True)]
    spread = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if seeds > 1 else 0:.3f}" for values in (dense, other, apart)]
    return [name, str(RANKS[name]), f"{sent:,.0f}", f"{less:,.0f}", f"{sent / less:.1f}", *spread]


@click.command()
@click.option("--steps", default=1000, help="Steps of each training.")
@click.option("--seeds", default=3, help="Seeds of each method.")
@click.option("--only", default=";".join(RANKS), help="Examples, separated by semicolons.")
@click.option("--method", type=click.Choice(list(METHODS)), default="dct", help="What is compared with dense.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.")
def main(steps: int, seeds: int, only: str, method: str, results: Path) -> None:
    """Prints a table, and keeps all runs in the results."""
    record, names = Record(results, RUN, MEASURED), only.split(";")
    for name in names:
        train_all(record, name, method, steps, seeds)
    print(f"{steps} steps, {seeds} seeds, mean and standard deviation; {circumstances()}")
    heads = ["example", "ranks", "bytes dense", f"bytes {method}", "ratio", "loss dense", f"loss {method}", "seed by seed"]
    print(tabulate([row(record, name, method, steps, seeds) for name in names], heads, disable_numparse=True))


if __name__ == "__main__":
    main()
