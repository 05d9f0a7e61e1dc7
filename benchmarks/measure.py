"""Shared by the benchmarks: interleaved timing, and the circumstances that every figure is published with."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(
    functions: dict[str, Callable[[], object]], repeats: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, Timing]:
    """Times the functions in turn, ``repeats`` times each after one untimed round, so that a noisy machine disturbs all of them alike.

    ``prepare`` runs untimed before each of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            prepare()
            start = time.perf_counter()
            function()
            if repeat:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(values: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), quintiles[0], quintiles[3])


def circumstances() -> str:
    """Processor, cores, threads, versions and date, in one line."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    date = datetime.date.today().isoformat()
    machine = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {date}"
