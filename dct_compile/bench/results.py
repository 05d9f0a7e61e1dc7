"""Measurements as rows of a CSV file and as tables, and what a data-parallel step costs beside a dense all_reduce."""

import csv
import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType

import torch
from tabulate import tabulate

from dct_compile.bench.cases import BASELINES
from dct_compile.bench.inputs import CONFIG, Problem
from dct_compile.bench.kernels import OP, Measurement
from dct_compile.bench.machine import device_name
from dct_compile.triton_kernels.compat import triton
from dct_compile.triton_kernels.schedule import is_refresh_step

STEP_CASES = ("select_threshold exact", "threshold_pack error feedback", "unpack_accumulate 2 payloads")
"""The calls of a data-parallel step of two ranks; the first of them at refresh steps only."""
RING_ALL_REDUCE_PASSES = 5
"""Times that a ring all_reduce moves each element through a rank's memory: to reduce, read 2 and write 1; to gather, read 1, write 1."""
COLUMNS = (
    *("date", "device", "device_name", "threads", "memory", "torch", "triton", "python"),
    *("op", "variant", "numel", "width", "density", "dtype", "status", "checked_numel", "samples"),
    *("median_ms", "p20_ms", "p80_ms", "floor_bytes", "floor_formula", "bytes_per_s", "copy_bytes_per_s", "percent_of_copy", "vs_add"),
    *(f"{name}_ms" for name in BASELINES),
    *(f"speedup_{name}" for name in BASELINES),
    *("all_reduce_ms", "share_of_all_reduce", "share_in_warmup"),
)
"""Of the CSV file; what does not apply to a row is empty. ``vs_add``: the median over that of ``torch.add(a, b, out=c)``, float32.

``memory``: what becomes of freed CPU memory, "system" (glibc's default for large blocks) or "kept".
"""

Row = Mapping[str, object]


@dataclass(frozen=True)
class StepOverhead:
    """The cost of compression in a data-parallel step of two ranks, beside the memory time of the dense ring all_reduce that it replaces.

    ``problem``: the gradient. ``select_ms``: an exact `select_threshold`; ``pack_ms``; ``unpack_ms``: of 2 payloads.
    ``all_reduce_ms``: 5 times the gradient's bytes (20 bytes per float32 element) at the copy bandwidth; the link is not in it.
    """

    problem: Problem
    select_ms: float
    pack_ms: float
    unpack_ms: float
    all_reduce_ms: float

    def step_ms(self, refreshes_per_step: float) -> float:
        """Milliseconds of the mean step."""
        return self.select_ms * refreshes_per_step + self.pack_ms + self.unpack_ms

    @property
    def steady_ms(self) -> float:
        """With one refresh per ``refresh_interval`` steps."""
        return self.step_ms(1 / CONFIG.refresh_interval)

    @property
    def warmup_ms(self) -> float:
        """The mean of the first ``refresh_interval`` steps, in which the geometric schedule refreshes more often."""
        return self.step_ms(warmup_refreshes() / CONFIG.refresh_interval)


def warmup_refreshes() -> int:
    """Refreshes in the first ``refresh_interval`` steps of the geometric schedule, without overflows."""
    return sum(is_refresh_step(step, CONFIG.refresh_interval, CONFIG.refresh_warmup, False) for step in range(CONFIG.refresh_interval))


def step_overheads(measurements: Iterable[Measurement]) -> list[StepOverhead]:
    """One for each gradient for which all three ops were measured."""
    found: dict[Problem, dict[str, Measurement]] = {}
    for measured in measurements:
        if measured.timings:
            found.setdefault(measured.problem, {})[f"{measured.case.op_name} {measured.case.variant}"] = measured
    steps = []
    for problem, by_name in found.items():
        if all(name in by_name for name in STEP_CASES):
            parts = [by_name[name] for name in STEP_CASES]
            all_reduce_ms = all_reduce_bytes(problem) / median(part.copy_bytes_per_s for part in parts) * 1e3
            select_ms, pack_ms, unpack_ms = (part.timings[OP].median_ms for part in parts)
            steps.append(StepOverhead(problem, select_ms, pack_ms, unpack_ms, all_reduce_ms))
    return steps


def all_reduce_bytes(problem: Problem) -> int:
    """Bytes that a dense ring all_reduce of the gradient moves through a rank's memory."""
    return RING_ALL_REDUCE_PASSES * problem.numel * problem.dtype.itemsize


class CsvFile:
    """The rows of one run on one device, on disk as soon as they are known."""

    def __init__(self, path: Path, device: torch.device, memory: str) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._common = {
            "date": datetime.date.today().isoformat(),
            "device": device.type,
            "device_name": device_name(device),
            "threads": torch.get_num_threads(),
            "memory": memory,
            "torch": torch.__version__,
            "triton": "" if triton is None else triton.__version__,
            "python": platform.python_version(),
        }

    def __enter__(self) -> "CsvFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, measured: Measurement) -> None:
        """Adds a row for an op."""
        row = {
            **_sizes(measured.problem),
            "op": measured.case.op_name,
            "variant": measured.case.variant,
            "status": measured.status,
            "checked_numel": measured.checked_numel,
            "floor_bytes": measured.case.floor_bytes(measured.problem),
            "floor_formula": measured.case.formula,
        }
        self._write(row | (_times(measured) if measured.timings else {}))

    def add_step(self, step: StepOverhead) -> None:
        """Adds a row for the cost of compression in a data-parallel step."""
        self._write(
            {
                **_sizes(step.problem),
                "op": "data-parallel step",
                "variant": "select + pack + unpack 2",
                "status": "ok",
                "median_ms": step.steady_ms,
                "all_reduce_ms": step.all_reduce_ms,
                "share_of_all_reduce": step.steady_ms / step.all_reduce_ms,
                "share_in_warmup": step.warmup_ms / step.all_reduce_ms,
            }
        )

    def _write(self, row: Row) -> None:
        self._writer.writerow({**self._common, **row})
        self._file.flush()


def ops_table(measurements: Sequence[Measurement]) -> str:
    """Returns every measurement, with what was not run."""
    headers = ["op", "numel", "density", "dtype", "ms", "p20", "p80", "GB/s", "% copy", "vs add", *BASELINES]
    rows = []
    for measured in measurements:
        start = [measured.case.title(measured.problem), *_cells(measured.problem)]
        if not measured.timings:
            rows.append([*start, measured.status])
            continue
        timing = measured.timings[OP]
        times = [f"{value:.3f}" for value in (timing.median_ms, timing.p20_ms, timing.p80_ms)]
        bandwidth = [f"{measured.bytes_per_s / 1e9:.1f}", f"{measured.percent_of_copy:.0f}"]
        ratios = [measured.vs_add, *(measured.speedup(name) for name in BASELINES)]
        rows.append([*start, *times, *bandwidth, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    note = (
        f"GB/s: the floor of the op's traffic over its median time. % copy: of that of dst.copy_(src), {copy_range(measurements)}.\n"
        "vs add: the op's time over that of torch.add(a, b, out=c). eager and the following: how many times faster the op is than that."
    )
    return f"{tabulate(rows, headers, disable_numparse=True)}\n{note}"


def steps_table(steps: Sequence[StepOverhead]) -> str:
    """Returns the table of a data-parallel step's cost; its caption defines the measure."""
    headers = ["numel", "density", "dtype", "step ms", "all_reduce ms", "share", "share in warm-up"]
    rows = []
    for step in steps:
        shares = [f"{100 * ms / step.all_reduce_ms:.0f} %" for ms in (step.steady_ms, step.warmup_ms)]
        rows.append([*_cells(step.problem), f"{step.steady_ms:.3f}", f"{step.all_reduce_ms:.3f}", *shares])
    interval = CONFIG.refresh_interval
    note = (
        f"Step: exact select_threshold / {interval} + threshold_pack + unpack_accumulate of 2 payloads. all_reduce: what a dense ring\n"
        "moves through a rank's memory (reduce: read 2, write 1; gather: read 1, write 1: 20 bytes per float32 element) at the copy\n"
        f"bandwidth, without the link. Warm-up: the first {interval} steps, {warmup_refreshes()} of which refresh."
    )
    return f"{tabulate(rows, headers, disable_numparse=True)}\n{note}"


def copy_range(measurements: Iterable[Measurement]) -> str:
    """Returns the bandwidth of the copy over the run: "31.0 to 33.2 GB/s"."""
    bandwidths = [measured.copy_bytes_per_s / 1e9 for measured in measurements if measured.timings]
    return f"{min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s" if bandwidths else "not measured"


def _sizes(problem: Problem) -> dict[str, object]:
    dtype = str(problem.dtype).removeprefix("torch.")
    return {"numel": problem.numel, "width": problem.width, "density": problem.density, "dtype": dtype}


def _cells(problem: Problem) -> list[str]:
    """Size, density and dtype as text."""
    return [f"2^{problem.numel.bit_length() - 1}", f"{problem.density:g}", str(problem.dtype).removeprefix("torch.")]


def _times(measured: Measurement) -> dict[str, object]:
    timing = measured.timings[OP]
    return {
        "samples": timing.samples,
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "bytes_per_s": measured.bytes_per_s,
        "copy_bytes_per_s": measured.copy_bytes_per_s,
        "percent_of_copy": measured.percent_of_copy,
        "vs_add": measured.vs_add,
        **{f"{name}_ms": measured.timings[name].median_ms for name in BASELINES if name in measured.timings},
        **{f"speedup_{name}": measured.speedup(name) for name in BASELINES},
    }
