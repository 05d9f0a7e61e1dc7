"""``dct_compile.monitor``: what every site does while a model trains, without making the device wait."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from dct_compile.labels import site_label
from dct_compile.measure import BucketMeasure, Reading, Totals
from dct_compile.report import ReportEntry
from dct_compile.runtime import RUNTIME, Runtime
from dct_compile.state import BucketState


class ScalarWriter(Protocol):
    """What :meth:`Monitor.write` needs of TensorBoard's ``SummaryWriter``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any:
        """Records one number."""


@dataclass(frozen=True)
class SiteStats:
    """One site since the reading before (at the first reading: since its state began), on this rank.

    ``label``, ``kind``, ``collective``: which site. ``dense_bytes``, ``wire_bytes``: per rank and call, before and after. The rest is known
    of compressed gradients only, and ``None`` elsewhere and while the site has not run. ``steps``: how often it ran. ``density``: fraction
    of the elements sent. ``overflow``: entries that found no room. ``threshold``: as it is now, mean over the site's parameters.
    ``residual_norm``: L2 norm of what waits to be sent. ``bytes_sent``: ``steps`` times ``wire_bytes``.
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
            threshold=sum(totals[bucket].threshold for bucket in known) / len(known),
            residual_norm=sum(totals[bucket].residual_norm ** 2 for bucket in known) ** 0.5,
            bytes_sent=steps * self.wire_bytes,
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
        """To be called after every training step. Returns whether ``sites`` holds new numbers.

        Every ``every``-th call starts to copy them from the device; they are here at one of the next calls, on a CPU at once.
        """
        self.steps += 1
        if self.steps % self.every == 0 and not self._readings:
            found = {bucket for site in _sites(self._runtime.reports.entries) for bucket in site.buckets}
            self._readings = {bucket: Reading(bucket) for bucket in found}
        if not self._readings or not all(reading.ready() for reading in self._readings.values()):
            return False
        self._finish()
        return True

    def summary(self) -> dict[str, float]:
        """One line of it: ``density`` and ``overflow`` over all gradients, ``compression`` (dense bytes over sent ones) over all sites.

        What is not known yet is left out.
        """
        return dict(self._summary)

    def write(self, writer: ScalarWriter, step: int) -> None:
        """Records the newest numbers, once, as scalars ``dct/<site>/<number>`` at ``step``; ``writer``: TensorBoard's ``SummaryWriter``."""
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
        self.sites = tuple(site.stats(windows, totals) for site in _sites(self._runtime.reports.entries))
        self._summary = _summary(self.sites, windows.values())
        self._readings, self._totals, self._unwritten = {}, WeakKeyDictionary(totals), True


def monitor(every: int = 100) -> Monitor:
    """Watches all sites of backend "dct" in this process, without a wait for the device on any step::

        with dct_compile.monitor(every=100) as monitor:
            for step, batch in enumerate(loader):
                train(batch)
                if monitor.step():
                    monitor.write(summary_writer, step)

    ``every``: steps between two readings of the counters; each reading is a few small kernels and one copy per bucket. ``monitor.sites``
    holds a :class:`SiteStats` per site, ``monitor.summary()`` one line of numbers. Raises ``ValueError`` when ``every`` is no integer >= 1.
    """
    return Monitor(every, RUNTIME)


def _sites(entries: Iterable[ReportEntry]) -> list[_Site]:
    """The report's sites. One that several graphs hold counts once, with the bytes of the first and the states of all."""
    found: dict[tuple[str, str, str], _Site] = {}
    for entry in entries:
        earlier = set(found)
        for site, measure in entry.sites:
            key = (site.name, site.kind, site.collective)
            held = found.setdefault(key, _Site(site_label(site.name, site.kind), site.kind, site.collective))
            if key not in earlier:
                held.dense_bytes += site.dense_bytes
                held.wire_bytes += site.wire_bytes
            if isinstance(measure, BucketMeasure):
                held.buckets += [bucket for bucket in measure.buckets if bucket not in held.buckets]
    return list(found.values())


def _since(before: Totals, now: Totals) -> Totals:
    """What was counted between two readings; a state that was reset or replaced in between counts from its start."""
    if now.steps < before.steps:
        return now
    steps, kept = now.steps - before.steps, now.kept - before.kept
    return replace(now, steps=steps, kept=kept, seen=now.seen - before.seen, overflow=now.overflow - before.overflow)


def _summary(sites: Iterable[SiteStats], windows: Iterable[Totals]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    windows = list(windows)
    if seen := sum(window.seen for window in windows):
        numbers["density"] = sum(window.kept for window in windows) / seen
        numbers["overflow"] = sum(window.overflow for window in windows)
    if sent := sum(site.wire_bytes for site in sites):
        numbers["compression"] = sum(site.dense_bytes for site in sites) / sent
    return numbers


def _tag(label: str, name: str) -> str:
    """TensorBoard replaces other characters itself, with a warning each time."""
    return f"dct/{re.sub(r'[^-/.0-9A-Za-z_]+', '_', label)}/{name}"
