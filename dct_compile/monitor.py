"""``dct_compile.monitor``: measures every site while a model trains, without making the device wait."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from dct_compile.labels import site_label
from dct_compile.measure import BucketMeasure, Reading, Totals
from dct_compile.report import ReportRegistry, Sums, step_and_evaluation
from dct_compile.runtime import RUNTIME, Runtime
from dct_compile.state.bucket import BucketState


class ScalarWriter(Protocol):
    """The part of TensorBoard's ``SummaryWriter`` that :meth:`Monitor.write` needs."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Records one number."""


@dataclass(frozen=True)
class SiteStats:
    """One site since the previous reading, on this rank. The first reading counts from the start of the site's state.

    ``label``, ``kind``, ``collective``: the identity of the site. ``dense_bytes``, ``wire_bytes``: bytes per rank and call, before and
    after.

    The other fields are known for compressed gradients only. They are ``None`` elsewhere, and while the site has not run.

    ``steps``: the number of its runs. ``density``: fraction of the elements sent. ``overflow``: entries that found no room.
    ``threshold``: its present value, mean over the site's parameters. ``residual_norm``: L2 norm of the elements that are not sent yet.
    ``bytes_sent``: ``steps`` times ``wire_bytes``. ``stepped``: how the optimizer treats the parameters, see
    :class:`dct_compile.SiteReport`.
    """

    label: str
    kind: str
    collective: str
    dense_bytes: int
    wire_bytes: int
    steps: int | None = None
    density: float | None = None
    overflow: int | None = None
    threshold: float | None = None
    residual_norm: float | None = None
    bytes_sent: int | None = None
    stepped: str | None = None


SCALARS = ("density", "overflow", "threshold", "residual_norm", "bytes_sent", "wire_bytes")
"""The numbers of :class:`SiteStats` that :meth:`Monitor.write` records."""


@dataclass
class _Site:
    """A site of the report and the states behind it."""

    label: str
    kind: str
    collective: str
    dense_bytes: int = 0
    wire_bytes: int = 0
    buckets: list[BucketState] = field(default_factory=list)

    def stats(self, windows: Mapping[BucketState, Totals], totals: Mapping[BucketState, Totals]) -> SiteStats:
        fixed = (self.label, self.kind, self.collective, self.dense_bytes, self.wire_bytes)
        known = [bucket for bucket in self.buckets if bucket in windows]
        steps = sum(windows[bucket].steps for bucket in known)
        seen = sum(windows[bucket].seen for bucket in known)
        if not seen:
            return SiteStats(*fixed)
        return SiteStats(
            *fixed,
            steps=steps,
            density=sum(windows[bucket].kept for bucket in known) / seen,
            overflow=sum(windows[bucket].overflow for bucket in known),
            threshold=_mean([found for bucket in known if (found := totals[bucket].threshold) is not None]),
            residual_norm=sum(totals[bucket].residual_norm ** 2 for bucket in known) ** 0.5,
            bytes_sent=steps * self.wire_bytes,
            stepped=BucketMeasure(known).stepped(),
        )


class Monitor:
    """Reads the counters of all sites every ``every`` steps; see :func:`monitor`."""

    def __init__(self, every: int, runtime: Runtime) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; allowed is an integer >= 1: the steps between two readings")
        self.every, self.steps = every, 0
        self.sites: tuple[SiteStats, ...] = ()
        self._runtime = runtime
        self._readings: dict[BucketState, Reading] = {}
        self._totals: WeakKeyDictionary[BucketState, Totals] = WeakKeyDictionary()
        self._summary: dict[str, float] = {}
        self._unwritten = False

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for a reading that is under way."""
        if self._readings:
            self._finish()

    def step(self) -> bool:
        """Counts one training step, and reads the counters when a reading is due. Call it after every training step.

        Every ``every``-th call starts to copy the counters from the device. They arrive at one of the next calls; on a CPU, at once.

        Returns:
            True if ``sites`` holds new numbers.
        """
        self.steps += 1
        if self.steps % self.every == 0 and not self._readings:
            found = {bucket for site in _sites(self._runtime.reports) for bucket in site.buckets}
            self._readings = {bucket: Reading(bucket) for bucket in found}
        if not self._readings or not all(reading.ready() for reading in self._readings.values()):
            return False
        self._finish()
        return True

    def summary(self) -> dict[str, float]:
        """Returns a few numbers over all sites. A number that is not known yet is left out.

        Returns:
            ``density`` (a fraction) and ``overflow`` (entries) over all gradients; ``compression`` (dense bytes over sent bytes) of one
            training step, see :class:`dct_compile.Report`.
        """
        return dict(self._summary)

    def write(self, writer: ScalarWriter, step: int) -> None:
        """Records the newest numbers once, as scalars ``dct/<site>/<number>``.

        Args:
            writer: TensorBoard's ``SummaryWriter``, or an object with the same ``add_scalar``.
            step: The step of the scalars.
        """
        if not self._unwritten:
            return
        self._unwritten = False
        for site in self.sites:
            for name in SCALARS:
                number = getattr(site, name)
                if number is not None:
                    writer.add_scalar(_tag(site.label, name), number, step)

    def _finish(self) -> None:
        totals = {bucket: reading.totals() for bucket, reading in self._readings.items()}
        windows = {bucket: _since(self._totals.get(bucket, Totals()), now) for bucket, now in totals.items()}
        self.sites = tuple(site.stats(windows, totals) for site in _sites(self._runtime.reports))
        self._summary = _summary(step_and_evaluation(self._runtime.reports.sites(measured=False))[0], windows.values())
        self._readings, self._totals, self._unwritten = {}, WeakKeyDictionary(totals), True


def monitor(every: int = 100) -> Monitor:
    """Watches all sites of backend "dct" in this process, without a wait for the device on any step::

        with dct_compile.monitor(every=100) as monitor:
            for step, batch in enumerate(loader):
                train(batch)
                if monitor.step():
                    monitor.write(summary_writer, step)

    Args:
        every: Steps between two readings of the counters. Each reading is a few small kernels and one copy per bucket.

    Returns:
        The monitor. ``monitor.sites`` holds a :class:`SiteStats` per site, ``monitor.summary()`` returns a few numbers over all sites.

    Raises:
        ValueError: ``every`` is not an integer >= 1.
    """
    return Monitor(every, RUNTIME)


def _sites(reports: ReportRegistry) -> list[_Site]:
    """Returns the report's sites.

    A site that several graphs hold counts once, with the bytes of the first graph that a step runs, and the states of all. Sites of
    several DDP modules are never the same.
    """
    found: dict[tuple[str, ...], _Site] = {}
    for entry in sorted(reports.entries, key=lambda entry: reports.calls(entry) == 0):
        earlier, labels = set(found), {site.label for site in found.values()}
        for site, measure in entry.sites:
            key = (entry.model, site.name, site.kind, site.collective)
            label = site_label(site.name, site.kind)
            label = f"{entry.model} {label}" if entry.model and key not in earlier and label in labels else label
            held = found.setdefault(key, _Site(label, site.kind, site.collective))
            if key not in earlier:
                held.dense_bytes += site.dense_bytes
                held.wire_bytes += site.wire_bytes
            if isinstance(measure, BucketMeasure):
                held.buckets += [bucket for bucket in measure.buckets if not bucket.is_given_up and bucket not in held.buckets]
    return list(found.values())


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def _since(before: Totals, now: Totals) -> Totals:
    """Subtracts the counts of an earlier reading. A state that was reset or replaced in between counts from its start."""
    if now.steps < before.steps or now.restarts != before.restarts:
        return now
    steps, kept = now.steps - before.steps, now.kept - before.kept
    return replace(now, steps=steps, kept=kept, seen=now.seen - before.seen, overflow=now.overflow - before.overflow)


def _summary(step: Sums, windows: Iterable[Totals]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    windows = list(windows)
    if seen := sum(window.seen for window in windows):
        numbers["density"] = sum(window.kept for window in windows) / seen
        numbers["overflow"] = sum(window.overflow for window in windows)
    if step.wire:
        numbers["compression"] = step.dense / step.wire
    return numbers


def _tag(label: str, name: str) -> str:
    """Returns the name of a scalar. TensorBoard would replace other characters too, with a warning each time."""
    return f"dct/{re.sub(r'[^-/.0-9A-Za-z_]+', '_', label)}/{name}"
