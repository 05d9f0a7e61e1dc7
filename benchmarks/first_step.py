"""What the first training step costs: backend "dct" against "inductor", with empty and with filled caches.

A small GPT-2 is trained by two gloo ranks on this machine. Its first step is measured from ``torch.compile`` to the end of the optimizer:
compilation, forward, backward. Each measurement is a run of fresh processes, and the variants take turns. Three states of the caches:

    cold       Inductor's cache and that of this project are empty
    library    as cold, but the library of C++ kernels has been built: it is built once per machine and version
    warm       a second run with the caches that the cold one filled

    python benchmarks/first_step.py [--repetitions 3] [--threads 1]
"""

import csv
import datetime
import itertools
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from dct_compile.bench.machine import circumstances, processor_name
from dct_compile.triton_kernels.cpu.build import load_library

RANKS, BLOCKS, HEADS, WIDTH, VOCABULARY, SEQUENCE, BATCH = 2, 2, 4, 256, 1024, 128, 8
RESULTS = Path(__file__).parent / "results" / "first_step.csv"
CACHES = ("cold", "library", "warm")


@dataclass(frozen=True)
class Variant:
    """A backend, and who averages the gradients: DDP, or the backend itself with ``data_parallel``."""

    backend: str
    data_parallel: bool

    @property
    def name(self) -> str:
        return f"{self.backend}, data_parallel" if self.data_parallel else f"DDP + {self.backend}"


BASELINE = Variant("inductor", False)
VARIANTS = (BASELINE, Variant("dct", False), Variant("dct", True))


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, width] -> the same shape."""
        batch, sequence, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, sequence, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attention = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attention.transpose(1, 2).reshape(batch, sequence, WIDTH))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return result


class GPT(nn.Module):
    """A small GPT-2 with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64[batch, sequence] -> logits [batch, sequence, vocabulary]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return nn.functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def _options(variant: Variant) -> dict[str, Any] | None:
    if variant.backend != "dct":
        return None
    return {"link": None, "data_parallel": variant.data_parallel}


def first_step(variant: Variant) -> float:
    """Seconds of the first step on this rank."""
    torch.manual_seed(0)
    model: nn.Module = GPT()
    if not variant.data_parallel:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    dist.barrier()
    start = time.perf_counter()
    compiled = torch.compile(model, backend=variant.backend, options=_options(variant))
    logits = compiled(ids[:, :-1])
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    return time.perf_counter() - start


def _rank(rank: int, folder: str, threads: int, function: Callable[..., Any], *args: Any) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
    os.environ["DCT_COMPILE_CACHE_DIR"] = f"{folder}/dct"
    tempfile.tempdir = folder  # where a library is kept that has no place in its own cache
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    result = function(*args)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.barrier()
    dist.destroy_process_group()


def _run(folder: str, threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """What ``function`` returns on rank 0, in fresh processes with the caches in ``folder``."""
    store, result = Path(folder) / "store", Path(folder) / "result.pt"
    for left in (store, result):
        left.unlink(missing_ok=True)
    spawn(_rank, (folder, threads, function, *args), nprocs=RANKS)
    return torch.load(result, weights_only=False)


def _build_library() -> bool:
    return load_library() is not None


def measure(repetitions: int, threads: int) -> dict[tuple[Variant, str], list[float]]:
    """Seconds by variant and state of the caches; each is printed when it is known."""
    seconds: dict[tuple[Variant, str], list[float]] = {(variant, cache): [] for cache in CACHES for variant in VARIANTS}

    def add(variant: Variant, cache: str, folder: str) -> None:
        seconds[variant, cache].append(_run(folder, threads, first_step, variant))
        print(f"{variant.name}, {cache}: {seconds[variant, cache][-1]:.2f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as built:
        _run(built, threads, _build_library)
        for _, variant in itertools.product(range(repetitions), VARIANTS):
            with tempfile.TemporaryDirectory() as empty:
                for cache in ("cold", "warm"):
                    add(variant, cache, empty)
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(built, copy, dirs_exist_ok=True)
                add(variant, "library", copy)
    return seconds


def rows(seconds: dict[tuple[Variant, str], list[float]], threads: int) -> list[dict[str, object]]:
    """One row per variant and state of the caches, with the ratio to the baseline's median."""
    return [
        {
            "date": datetime.date.today().isoformat(),
            "device_name": processor_name(),
            "cores": os.cpu_count(),
            "threads": threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "ranks": RANKS,
            "cache": cache,
            "variant": variant.name,
            "samples": len(values),
            "median_s": statistics.median(values),
            "least_s": min(values),
            "most_s": max(values),
            "vs_inductor": statistics.median(values) / statistics.median(seconds[BASELINE, cache]),
        }
        for (variant, cache), values in seconds.items()
    ]


@click.command()
@click.option("--repetitions", default=3, type=click.IntRange(min=1), help="Measurements of each variant and state of the caches.")
@click.option("--threads", default=1, type=click.IntRange(min=1), help="Threads of each rank.")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), help="The CSV file.")
def main(repetitions: int, threads: int, output: Path) -> None:
    """Prints the first step's seconds and their ratios, and writes them to a CSV file."""
    found = rows(measure(repetitions, threads), threads)
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    torch.set_num_threads(threads)
    print(f"GPT-2 of {BLOCKS} blocks, width {WIDTH}, sequence {SEQUENCE}, batch {BATCH} per rank, {RANKS} gloo ranks; {circumstances()}")
    columns = ("cache", "variant", "median_s", "least_s", "most_s", "vs_inductor")
    headers = ["caches", "variant", "first step s", "least", "most", "x inductor"]
    print(tabulate([[row[name] for name in columns] for row in found], headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
