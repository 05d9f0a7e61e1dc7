"""Reads the counters of a gradient site's buckets: at once for the report, or without waiting for the device for a monitor."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.state.bucket import BucketState


@dataclass
class BucketMeasure:
    """A site's ``Measure``. ``buckets`` are the states that it has run with; the list grows when a graph serves further parameters."""

    buckets: list[BucketState]

    def __call__(self) -> tuple[float, int, str | None] | None:
        """Achieved density and entries overflowed since the start, over all parameters, and how these are stepped. Waits for the device.

        ``None`` before the first exchange.
        """
        totals = [Reading(bucket).totals() for bucket in self.buckets]
        seen = sum(item.seen for item in totals)
        return (sum(item.kept for item in totals) / seen, sum(item.overflow for item in totals), self.stepped()) if seen else None

    def stepped(self) -> str | None:
        """Returns how the last optimizer step has treated the parameters; with the number of parameters where they differ."""
        found = [
            use.stepped or "not stepped yet"
            for bucket in self.buckets
            for ref, use in zip(bucket.parameters, bucket.pending.uses, strict=False)  # a state that is only looked at has no uses
            if ref() is use.parameter()  # another bucket may have taken it over; a model that is gone stays in the report
        ]
        ways = Counter(found).most_common()
        return ", ".join(f"{way} ({count})" if len(ways) > 1 else way for way, count in ways) or None


@dataclass(frozen=True)
class Totals:
    """One bucket's numbers. ``kept`` of ``seen`` elements were sent in ``steps`` steps, ``overflow`` found no room (at the owner, too).

    ``threshold``: mean over the parameters, ``None`` for a scheme without one. ``residual_norm``: L2 norm of all that was not sent yet.
    ``restarts``: how often the counters were reset.
    """

    steps: int = 0
    kept: int = 0
    seen: int = 0
    overflow: int = 0
    threshold: float | None = None
    residual_norm: float = 0.0
    restarts: int = 0


class Reading:
    """A bucket's numbers on their way to the host. Starting one does not wait for the device that computes them."""

    def __init__(self, bucket: BucketState) -> None:
        self.numels, self.sent, self.restarts = bucket.spec.counted or bucket.spec.numels, bucket.spec.sent, bucket.pending.restarts
        named = {name: [bucket.tensors[item.input_name] for item in bucket.spec.tensors if item.name == name] for name in _READ}
        self.has_threshold = bool(named["threshold"])
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(residual) for residual in named["residual"]]))
            overflow = torch.stack([counters[:, 2].sum() for counters in named["counters"]]).sum()
            steps, kept = named["counters"][0][:, 0], named["counters"][0][:, 1]
            threshold = named["threshold"][0].mean() if self.has_threshold else norm
            # float64 holds every count below 2^53, so that one copy serves all.
            numbers = torch.cat([item.double().reshape(-1) for item in (steps, kept, threshold, norm, overflow)])
            self.host, self.arrived = _to_host(numbers)

    def ready(self) -> bool:
        """Returns True if :meth:`totals` would not have to wait."""
        return self.arrived is None or self.arrived.query()

    def totals(self) -> Totals:
        """Waits until the numbers have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        count = len(self.numels)
        numbers = self.host.tolist()
        steps, kept, (threshold, norm, overflow) = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
        seen = sum(int(own) * numel for own, numel in zip(steps, self.numels, strict=True))
        if self.sent is not None:
            kept = [own * sent for own, sent in zip(steps, self.sent, strict=True)]
        chosen = threshold if self.has_threshold else None
        return Totals(int(max(steps)), int(sum(kept)), seen, int(overflow), chosen, norm, self.restarts)


_READ = ("residual", "counters", "threshold")
"""The tensors of a state that are read, see :class:`dct_compile.state.spec.StateTensor`. The first stage's are a rank's own."""


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Returns the host's copy, and the event after which it is complete (``None``: it is)."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))
    return host, arrived
