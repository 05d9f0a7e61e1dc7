"""Reads what the buckets of a gradient site have counted: at once for the report, or without waiting for the device for a monitor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.state import BucketState


@dataclass
class BucketMeasure:
    """A site's ``Measure``. ``buckets`` are the states that it has run with; the list grows when a graph serves further parameters."""

    buckets: list[BucketState]

    def __call__(self) -> tuple[float, int] | None:
        """Achieved density and entries overflowed since the start, over all parameters; ``None`` before the first step. Waits."""
        totals = [Reading(bucket).totals() for bucket in self.buckets]
        seen = sum(item.seen for item in totals)
        return (sum(item.kept for item in totals) / seen, sum(item.overflow for item in totals)) if seen else None


@dataclass(frozen=True)
class Totals:
    """One bucket's numbers. ``kept`` of ``seen`` elements were sent in ``steps`` steps, ``overflow`` found no room (at the owner, too).

    ``threshold``: mean over the parameters. ``residual_norm``: L2 norm of all that was not sent yet.
    """

    steps: int = 0
    kept: int = 0
    seen: int = 0
    overflow: int = 0
    threshold: float = float("inf")
    residual_norm: float = 0.0


class Reading:
    """A bucket's numbers on their way to the host. Starting one does not wait for the device that computes them."""

    def __init__(self, bucket: BucketState) -> None:
        self.numels = [numel for _, numel in bucket.layout.segments]
        stages = [bucket.local] if bucket.owner is None else [bucket.local, bucket.owner]
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(stage.residual) for stage in stages]))
            overflow = torch.stack([stage.counters[:, 2].sum() for stage in stages]).sum()
            steps, kept = bucket.local.counters[:, 0], bucket.local.counters[:, 1]
            # float64 holds every count below 2^53, so that one copy serves all.
            numbers = torch.cat([item.double().reshape(-1) for item in (steps, kept, bucket.local.threshold.mean(), norm, overflow)])
            self.host, self.arrived = _to_host(numbers)

    def ready(self) -> bool:
        """Whether :meth:`totals` would not have to wait."""
        return self.arrived is None or self.arrived.query()

    def totals(self) -> Totals:
        """Waits until the numbers have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        count = len(self.numels)
        numbers = self.host.tolist()
        steps, kept, (threshold, norm, overflow) = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
        seen = sum(int(own) * numel for own, numel in zip(steps, self.numels, strict=True))
        return Totals(int(max(steps)), int(sum(kept)), seen, int(overflow), threshold, norm)


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The host's copy, and the event after which it is complete (``None``: it is)."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))
    return host, arrived
