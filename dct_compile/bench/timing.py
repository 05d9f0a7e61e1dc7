"""How everything here is timed: in turns, on inputs that no cache holds, median and quintiles."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import torch

from dct_compile.bench.machine import last_level_cache_bytes

FEWEST_SAMPLES, MOST_SAMPLES = 3, 100
CACHE_MULTIPLE = 4
"""The copies of an input together are at least this many last-level caches long."""
HEAD_START_BYTES = 2**30
"""Bytes that are overwritten before a timed call on CUDA, if the cache is not larger: the host queues the call's launches in that time."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int


@dataclass(frozen=True)
class Contender:
    """Something to time: ``run(copy)`` works on one of ``copies`` inputs; ``restore(copy)``, untimed, undoes what it changed."""

    run: Callable[[int], object]
    copies: int
    restore: Callable[[int], object] = lambda copy: None


class Stopwatch:
    """Times single calls on one device, with cold caches.

    On a CPU the caller rotates through ``copies`` of its inputs. On CUDA the L2 cache is overwritten before each call, and the time is
    that between two events on the stream: the device's, and the host's only where the call waits for a result.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = last_level_cache_bytes(device)
        flushed = max(2 * self.cache_bytes, HEAD_START_BYTES) if device.type == "cuda" else 0
        self._flush = torch.empty(flushed, dtype=torch.uint8, device=device)

    def copies(self, input_bytes: int) -> int:
        """How many inputs of ``input_bytes`` it takes so that each is out of the cache when its turn comes again."""
        return 1 if self.device.type == "cuda" else max(1, ceil(CACHE_MULTIPLE * self.cache_bytes / input_bytes))

    def milliseconds(self, call: Callable[[], object]) -> float:
        """One run of ``call``."""
        if self.device.type == "cuda":
            return self._device_milliseconds(call)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def _device_milliseconds(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def interleaved(contenders: Mapping[str, Contender], stopwatch: Stopwatch, seconds: float) -> dict[str, Timing]:
    """Times all contenders in turn, after one untimed round, so that a noisy machine disturbs all of them alike.

    That round pays for what comes once: compilation, memory that is fresh from the system. Each is given about ``seconds``, but no fewer
    than ``FEWEST_SAMPLES`` runs and no more than ``MOST_SAMPLES``; one with few runs takes part in rounds that are spread evenly.
    """
    turns = itertools.count()

    def sample(contender: Contender) -> float:
        copy = next(turns) % contender.copies
        elapsed = stopwatch.milliseconds(lambda: contender.run(copy))
        contender.restore(copy)
        return elapsed

    for contender in contenders.values():
        sample(contender)
    samples = {name: [sample(contender)] for name, contender in contenders.items()}
    left = {name: min(max(int(seconds * 1e3 / first), FEWEST_SAMPLES), MOST_SAMPLES) - 1 for name, (first,) in samples.items()}
    rounds = max(left.values())
    for number in range(rounds):
        for name, contender in contenders.items():
            if number * left[name] // rounds != (number + 1) * left[name] // rounds:
                samples[name].append(sample(contender))
    return {name: summarise(values) for name, values in samples.items()}


def summarise(values: list[float]) -> Timing:
    """Median, 20th and 80th percentile of at least two times in milliseconds."""
    quintiles = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(statistics.median(values), quintiles[0], quintiles[3], len(values))
