"""What is measured on slow links: methods, models, the cells of the matrix and their results, and what a cell should take."""

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES
from torch import Tensor
from torch.nn import functional as F

from dct_compile.bench.machine import processor_name
from dct_compile.link import CPU_COPY_BYTES_PER_S, Link
from dct_compile.models.gpt import GPT
from dct_compile.models.parallel import Mesh
from dct_compile.models.resnet import ResNet
from dct_compile.models.tasks import TASKS, Batch, DataSource, Task
from dct_compile.models.tasks.gpt import CONTEXT, GptTask
from dct_compile.models.tasks.resnet import ResnetTask

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **BASELINES,
    "dct gather": ("dct", {"gradient_scheme": "gather", "link": None}),
    "dct gather, int8": ("dct", {"gradient_scheme": "gather", "dp_value_dtype": "int8", "link": None}),
    "dct gather, small buckets": ("dct", {"gradient_scheme": "gather", "link": None}),
    "dct gather, int8, small buckets": ("dct", {"gradient_scheme": "gather", "dp_value_dtype": "int8", "link": None}),
    "dct data_parallel, 25 MiB": ("dct", {"data_parallel": True, "gradient_scheme": "gather", "link": None}),
    "dct data_parallel": ("dct", {"data_parallel": True}),
    "dct owner": ("dct", {"gradient_scheme": "owner", "link": None}),
    "dct late": ("dct", {"arrival": "late", "link": None}),
    "dct powersgd": ("dct", {"gradient_scheme": "powersgd", "link": None}),
    "dct, small buckets": ("dct", {}),
    "dct": ("dct", {}),
}
"""Backend (dct_compile/cli/methods.py) and options by name. The first one is the baseline."""
BUCKET_MIB = {"dct gather, small buckets": 8, "dct gather, int8, small buckets": 8, "dct, small buckets": 8}
"""The buckets of DDP in MiB, where they are not the default ones: those that a note of the report names for the GPT at 100 Mbit/s."""
ON_SHARED_HOSTS: dict[str, tuple[str, dict[str, Any]]] = {"dct two_level": ("dct", {"gradient_scheme": "two_level", "link": None})}
"""The methods for hosts with several ranks each."""
RATES: dict[str, float | None] = {"10mbit": 10e6, "100mbit": 100e6, "1gbit": 1e9, "10gbit": 10e9, "none": None}
"""Bits per second of each uplink and downlink."""
GOODPUT = 0.94
"""The part of a rate that is left for gradients: headers of Ethernet, IP and TCP, and acknowledgements, take the rest."""
HOP_S = 0.3e-3
"""Seconds of one message beside its bytes, on namespaces of one machine."""


def measures_link(method: str) -> bool:
    """Returns True if a method measures the link and decides."""
    backend, options = (METHODS | ON_SHARED_HOSTS)[method]
    return backend == "dct" and options.get("link", "auto") == "auto"


class LargeGptTask(GptTask):
    """The GPT with 6.7 M parameters."""

    def build(self, mesh: Mesh) -> GPT:
        return GPT(width=368, blocks=4, context=CONTEXT)


class WideResnetTask(ResnetTask):
    """The ResNet with the first width of ResNet-18, on random images of Fashion-MNIST's size: only its time is measured."""

    def build(self, mesh: Mesh) -> ResNet:
        return ResNet(blocks=2, width=64)

    def epoch(self, seed: int, number: int, mesh: Mesh) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed * 1000 + number + mesh.dp_rank)
        rows = self.batch_size // mesh.dp
        images: Tensor = F.avg_pool2d(torch.randn(rows, 1, 32, 32, generator=generator), 5, stride=1)
        yield images, torch.randint(0, 10, (rows,), generator=generator)


@dataclass(frozen=True)
class Workload:
    """A task by its class, its rows for each data-parallel rank, and its model-parallel ranks."""

    task: type[Task]
    rows: int
    mp: int = 1

    def make(self, hosts: int) -> Task:
        """Returns the task for so many hosts: the rows of a host do not depend on their number."""
        return self.task(DataSource(self.task.recipe.datasets[0]), self.rows * hosts // self.mp)


WORKLOADS: dict[str, Workload] = {
    "dlrm": Workload(TASKS["dlrm"], 128),
    "dlrm, mp 2": Workload(TASKS["dlrm"], 128, mp=2),
    "gpt-small": Workload(TASKS["gpt"], 8),
    "gpt": Workload(LargeGptTask, 4),
    "resnet": Workload(WideResnetTask, 4),
}


@dataclass(frozen=True)
class Cell:
    """A place in the matrix. ``rate``: a name of RATES. ``repeat``: the how manieth measurement of it, from 0."""

    model: str
    hosts: int
    rate: str
    method: str
    repeat: int

    @property
    def bits_per_s(self) -> float | None:
        return RATES[self.rate]

    @property
    def build(self) -> tuple[str, int, str]:
        """What the cells of one compilation have in common: a method that measures the link is compiled for each rate."""
        return self.method, self.repeat, self.rate if measures_link(self.method) else ""


@dataclass(frozen=True)
class Result:
    """What was measured in a cell.

    ``steps``: timed ones. ``median_s``, ``q1_s``, ``q3_s``: of a step. ``cpu_s``: CPU time of a step, all threads of a rank.
    ``compute_s``, ``compute_cpu_s``: the same of the dense step without communication, just before and after on the same hosts.
    ``sent_bytes``: by a host's interface, per step, mean over the hosts. ``computed_bytes``: by the report, or from the shapes of the
    parameters; -1 where neither knows. ``hops``: messages one after the other. ``memory_bytes``: read
    and written by the kernels of "dct". ``cores``: of the machine, which the hosts share. ``error``: why there is no measurement.
    """

    steps: int = 0
    median_s: float = float("nan")
    q1_s: float = float("nan")
    q3_s: float = float("nan")
    cpu_s: float = float("nan")
    compute_s: float = float("nan")
    compute_cpu_s: float = float("nan")
    sent_bytes: float = float("nan")
    computed_bytes: float = -1.0
    hops: int = 0
    memory_bytes: float = 0.0
    cores: int = 1
    error: str = ""

    @classmethod
    def of(cls, answers: Sequence[dict[str, Any]], compute: Sequence[dict[str, Any]]) -> "Result":
        """Sums up the answers of all ranks about the cell, and about steps without communication: times are those of rank 0."""
        times: list[float] = answers[0]["times"]
        quartiles = statistics.quantiles(times, n=4, method="inclusive")
        return cls(
            steps=len(times),
            median_s=statistics.median(times),
            q1_s=quartiles[0],
            q3_s=quartiles[2],
            cpu_s=_mean(answers, "cpu_s"),
            compute_s=statistics.median(compute[0]["times"] + compute[len(answers)]["times"]),
            compute_cpu_s=_mean(compute, "cpu_s"),
            sent_bytes=_mean(answers, "sent_bytes"),
            computed_bytes=_mean(answers, "computed_bytes"),
            hops=answers[0]["hops"],
            memory_bytes=answers[0]["memory_bytes"],
            cores=os.cpu_count() or 1,
        )

    @property
    def bytes(self) -> float:
        """The bytes that a prediction starts from."""
        return self.sent_bytes if self.computed_bytes < 0 else self.computed_bytes

    def predicted_s(self, cell: Cell) -> float | None:
        if cell.bits_per_s is None:
            return None
        late = METHODS[cell.method][1].get("arrival") == "late"
        shared = max(1.0, cell.hosts / self.cores)
        return predict(self.compute_cpu_s, shared, self.hops, self.bytes, self.memory_bytes, cell.bits_per_s, late)

    def compute_on(self, hosts: int) -> float:
        """Returns the seconds of a step without communication while all hosts compute: their CPU time on the cores that they share."""
        return self.compute_cpu_s * max(1.0, hosts / self.cores)


def predict(cpu_s: float, shared: float, hops: int, wire_bytes: float, memory_bytes: float, bits_per_s: float, late: bool) -> float:
    """Returns the seconds that a step should take: compute, and the exchanges after it by the link model of the product.

    Args:
        cpu_s: CPU seconds of the step without communication.
        shared: Hosts for each core of the machine, at least 1.
        hops: Messages one after the other.
        wire_bytes: Bytes that a rank sends in the step.
        memory_bytes: Bytes of memory that the kernels of "dct" read and write in the step.
        bits_per_s: The rate of its link.
        late: Whether the messages are sent beside the next step.
    """
    link = Link(bits_per_s / 8 * GOODPUT, HOP_S, CPU_COPY_BYTES_PER_S)
    kernels, wire = link.seconds(0, 0, memory_bytes), link.seconds(hops, wire_bytes, 0)
    busy = (cpu_s + kernels) * shared
    return max(busy, wire) if late else busy + wire


def methods_of(model: str, hosts: int, chosen: Sequence[str]) -> list[str]:
    """Returns those of ``chosen`` that can train ``model``: hooks of torch need data-parallel ranks alone."""
    return [name for name in chosen if WORKLOADS[model].mp == 1 or METHODS[name][0] in ("dense", "dct")] if hosts > 1 else []


class ResultFile:
    """A CSV file of results, to which each is appended when it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append([*_names(Cell), *_names(Result), *_machine()])

    def read(self) -> dict[Cell, Result]:
        """Returns all results, also failures. The last one of a cell counts."""
        with self.path.open(newline="") as file:
            return {_from_row(Cell, row): _from_row(Result, row) for row in csv.DictReader(file)}

    def add(self, cell: Cell, result: Result) -> None:
        values = [f"{value:.6g}" if isinstance(value, float) else value for value in asdict(result).values()]
        self._append([*asdict(cell).values(), *values, *_machine().values()])

    def _append(self, row: Sequence[object]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def _mean(answers: Sequence[dict[str, Any]], name: str) -> float:
    return float(statistics.mean(answer[name] for answer in answers))


def _machine() -> dict[str, str]:
    date = datetime.datetime.now().isoformat(timespec="minutes")
    return {
        "date": date,
        "machine": processor_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


def _from_row(kind: Callable[..., Any], row: dict[str, str]) -> Any:
    return kind(**{field.name: field.type(row[field.name]) for field in fields(kind)})  # type: ignore[arg-type, operator]
