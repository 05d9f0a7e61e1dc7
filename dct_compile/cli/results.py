"""What a run of ``dct train`` measured: kept in metrics.json, from which tables, plots and the report are made."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from dct_compile.bench.machine import processor_name
from dct_compile.models.tasks import Metric
from dct_compile.report import SiteReport

FILE = "metrics.json"
RARE = ("buffer", "other")
"""Rows that are left out where nothing is sent."""
KINDS = {
    "gradient": ("gradient",),
    "activation": ("activation", "activation_gradient"),
    "embedding": ("embedding", "embedding_gradient"),
    "buffer": ("buffers",),
    "other": ("other",),
}
"""Rows of the table of bytes, and the kinds of sites that each of them sums up."""


@dataclass(frozen=True)
class Run:
    """One training.

    ``metrics``: of the test, by name. ``seconds`` of each step but the first ones, on rank 0; ``losses`` per step, mean over ranks.
    ``density``: (step, fraction of the gradient elements sent since step 1) of rank 0. ``replica_checks``: comparisons of the replicas'
    parameters, all of which found them identical (a run in which one does not has no result).
    """

    seed: int
    metrics: dict[str, float]
    steps: int
    seconds: list[float]
    losses: list[float]
    density: list[tuple[int, float]]
    replica_checks: int

    @property
    def steps_per_second(self) -> float:
        """Over all timed steps."""
        return len(self.seconds) / sum(self.seconds)

    def density_between(self) -> list[tuple[int, float]]:
        """``density`` as (step, fraction sent since the entry before)."""
        windows = []
        last_step, last_sum = 0, 0.0
        for step, density in self.density:
            windows.append((step, (density * step - last_sum) / (step - last_step)))
            last_step, last_sum = step, density * step
        return windows


@dataclass(frozen=True)
class BackendResult:
    """All runs of one backend.

    ``sites``: of every rank, the fields of :class:`SiteReport`; empty for all but dct. ``computed_bytes``: (first step, bytes that a rank
    sends per step), by the shapes of parameters; empty for dct, and where parameters do not tell.
    """

    backend: str
    runs: list[Run]
    sites: list[list[dict[str, Any]]]
    notes: list[str]
    computed_bytes: list[tuple[int, float]] = field(default_factory=list)

    def mean_and_spread(self, name: str) -> tuple[float, float | None]:
        """Mean and sample standard deviation over the seeds (``None`` for one seed) of a metric or of ``steps_per_second``."""
        values = [run.steps_per_second if name == "steps_per_second" else run.metrics[name] for run in self.runs]
        return mean(values), stdev(values) if len(values) > 1 else None

    def bytes_of(self, field: str, kinds: Sequence[str]) -> float:
        """``dense_bytes`` or ``wire_bytes`` that a rank sends per step at the sites of ``kinds``, mean over ranks."""
        total: int = sum(site["calls"] * site[field] for rank in self.sites for site in rank if site["kind"] in kinds)
        return total / max(1, len(self.sites))


@dataclass(frozen=True)
class Results:
    """Everything in metrics.json."""

    settings: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[Metric]
    backends: list[BackendResult]

    def get(self, backend: str) -> BackendResult | None:
        """Returns the result of one backend, if it was run."""
        return next((result for result in self.backends if result.backend == backend), None)

    def sent(self, result: BackendResult) -> list[tuple[int, float]]:
        """Returns (first step, bytes that a rank sends per step) of a backend, as far as it was run; empty where it is not known.

        DCT counts its bytes. It also counts those that dense sends with model parallelism, where the parameters do not tell.
        """
        dct = self.get("dct")
        counted = {"dct": "wire_bytes", "dense": "dense_bytes"}.get(result.backend)
        if result.computed_bytes or counted is None or dct is None or not any(dct.sites):
            return [(first, size) for first, size in result.computed_bytes if first <= result.runs[0].steps]
        return [(1, dct.bytes_of(counted, [kind for kinds in KINDS.values() for kind in kinds]))]

    def save(self, folder: Path) -> None:
        """Writes metrics.json."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Reads metrics.json."""
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        backends = [BackendResult(**{**item, "runs": [Run(**run) for run in item["runs"]]}) for item in content["backends"]]
        return cls(content["settings"], content["environment"], [Metric(**metric) for metric in content["metrics"]], backends)


def bytes_until(sent: Sequence[tuple[int, float]], steps: int) -> list[float]:
    """Returns the bytes sent from the first step until each of ``steps`` steps.

    Args:
        sent: (first step, bytes per step), as :meth:`Results.sent` returns it.
        steps: The number of steps.
    """
    return list(accumulate(next(size for first, size in reversed(sent) if first <= step) for step in range(1, steps + 1)))


def gradient_density(sites: Iterable[SiteReport]) -> float | None:
    """Fraction of the elements sent so far, over all compressed gradients; ``None`` when there is none."""
    measured = [(site.density, torch.Size(site.shape).numel()) for site in sites if site.kind == "gradient" and site.density is not None]
    total = sum(numel for _, numel in measured)
    return sum(density * numel for density, numel in measured) / total if total else None


def environment() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
    }
