"""Collects what compilations report, as long as the models live that they serve."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from dct_compile.reasons import Note, abbreviated
from dct_compile.report.data import DeferredGraph, GraphReport, SiteReport
from dct_compile.report.entry import Measure, ReportEntry, Use, sites_of
from dct_compile.report.patterns import Patterns
from dct_compile.report.report import Report
from dct_compile.report.torchrec import torchrec_notes

NOTHING_COMPILED = (
    "backend 'dct' has not been called: no compiled function has run yet, or torch.compile skipped the model "
    "(it does so for torch's own modules inside DDP, such as DDP(nn.Sequential(...)): make them part of a module class of your own)"
)
GRADIENTS_OUTSIDE = (
    "no gradient is in this table: the model is not wrapped in DDP and its graphs do not average gradients. What the training loop reduces"
    " itself, as by all_reduce of parameter.grad, stays dense and unseen; DDP or option data_parallel=True lets the backend do it"
)
NOT_REACHED = (
    "no graph of backend 'dct' runs inside of {modules}, so its gradients stay dense. torch.compile skips torch's own modules, such as"
    " nn.Sequential and nn.Linear, when DDP calls them: make them part of a module class of your own, or compile inside of DDP"
)


@dataclass
class ReportRegistry:
    """Collects what compilations report.

    Entries of models that are gone are dropped when another graph is added, or is called with other parameters. So a script can print the
    report after the function that trained.

    A pass is a forward with its backward, as far as it can be seen: it ends with a forward behind a backward. Compilations of one code that
    run in the same pass with the same parameters are all part of a step. An evaluation is a pass of its own.

    ``called``: whether the backend has been asked to compile anything. ``trains_alone``: whether a graph returned gradients of parameters
    on one of several ranks, with neither DDP nor ``data_parallel`` to average them. ``has_shards``: whether DTensor or FSDP distributes
    parameters: then it depends on the model which gradients have to be averaged. ``patterns``: those of the options.
    """

    entries: list[ReportEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    called: bool = False
    trains_alone: bool = False
    has_shards: bool = False
    patterns: Patterns = field(default_factory=Patterns)
    _models: "weakref.WeakKeyDictionary[object, str]" = field(default_factory=weakref.WeakKeyDictionary)
    _averaged: "list[weakref.ref[Tensor]]" = field(default_factory=list)
    _ignored: "list[tuple[str, weakref.ref[Tensor]]]" = field(default_factory=list)
    _passes: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    _is_backward_last: bool = False
    _encoded: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _dropped: "weakref.WeakSet[ReportEntry]" = field(default_factory=weakref.WeakSet)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)
    """Models may be trained, and compiled, in several threads."""

    def add(self, graph: GraphReport | DeferredGraph, sites: Sequence[tuple[SiteReport, Measure | None]]) -> ReportEntry:
        entry = ReportEntry(graph, sites)
        with self._lock:
            self._drop_dead()
            self.entries.append(entry)
        return entry

    def remove(self, entry: ReportEntry) -> None:
        with self._lock:
            if entry in self.entries:
                self.entries.remove(entry)

    def serve(self, entry: ReportEntry, parameters: Sequence[Tensor]) -> None:
        """Remembers that the graph of ``entry`` is called with ``parameters``."""
        with self._lock:
            if self._is_backward_last or not entry.training:
                self._passes[entry.training] += 1
                self._is_backward_last = False
            key = tuple(map(id, parameters))
            if key not in entry.uses or not entry.uses[key].lives:
                self._drop_dead()
                entry.uses[key] = Use([weakref.ref(parameter) for parameter in parameters])
                if entry in self._dropped:  # its model is gone, and another one of that class has come
                    self._dropped.remove(entry)
                    self.entries.append(entry)
            entry.uses[key].last = self._passes[entry.training]

    def backward_ran(self, entry: ReportEntry) -> None:
        """Remembers that the backward of ``entry`` runs."""
        with self._lock:
            entry.backward_ran()
            self._is_backward_last = True

    def calls(self, entry: ReportEntry) -> int:
        """Returns how often one step runs the graph of ``entry``.

        It is once for each set of parameters that it is called with, such as the layers of one class, or more often where a backward runs
        it more often. It is 0 where other compilations have taken over all these parameters.
        """
        current = sum(not any(entry.is_replaced_by(other, key) for other in self.entries) for key in entry.uses)
        return max(current, entry.backwards, 1) if current or not (entry.uses or entry.of_phase) else 0

    def _drop_dead(self) -> None:
        self._dropped.update(entry for entry in self.entries if not entry.lives)
        self.entries = [entry for entry in self.entries if entry.lives]
        self._averaged = [ref for ref in self._averaged if ref() is not None]
        self._ignored = [(name, ref) for name, ref in self._ignored if ref() is not None]
        for entry in [*self.entries, *self._dropped]:
            entry.uses = {key: use for key, use in entry.uses.items() if use.lives}

    def name_model(self, model: object, title: str) -> str:
        """Returns the name of a model: ``title``, with a number where another model that lives has it."""
        with self._lock:
            if model not in self._models:
                taken = set(self._models.values())
                names = (f"{title} #{number}" if number > 1 else title for number in count(1))
                self._models[model] = next(name for name in names if name not in taken)
            return self._models[model]

    def divide(self, averaged: Iterable[Tensor], ignored: Iterable[tuple[str, Tensor]]) -> None:
        """Remembers the parameters that a DDP module averages, and those that it was told to ignore: another one may average these."""
        with self._lock:
            self._averaged += [weakref.ref(parameter) for parameter in averaged]
            self._ignored += [(name, weakref.ref(parameter)) for name, parameter in ignored]

    def note(self, text: str) -> None:
        """Adds a note once."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def count_encoded(self, name: str, before: int, after: int) -> None:
        """Counts a tensor of ``before`` bytes that the public function ``name`` has encoded in ``after`` bytes, outside of every graph."""
        with self._lock:
            tensors, total_before, total_after = self._encoded.get(name, (0, 0, 0))
            self._encoded[name] = tensors + 1, total_before + before, total_after + after

    @contextmanager
    def lending_counts(self, other: "ReportRegistry") -> Iterator[None]:
        """While it lasts, what is encoded outside of graphs counts for ``other``."""
        kept, self._encoded = self._encoded, other._encoded
        try:
            yield
        finally:
            self._encoded = kept

    def clear(self) -> None:
        with self._lock:
            self._encoded.clear()
            self.entries.clear()
            self._dropped.clear()
            self.notes.clear()
            self._averaged.clear()
            self._ignored.clear()
            self.patterns.clear()
            self.trains_alone = self.has_shards = False

    def sites(self, *, measured: bool) -> list[SiteReport]:
        """Returns all sites. ``measured``: reads their counters, which waits for the device."""
        return sites_of(self._current(), measured)

    def snapshot(self, not_reached: Callable[[], Sequence[str]] = tuple) -> Report:
        """Returns the report so far.

        Args:
            not_reached: Returns the names of the DDP modules that average their gradients and have no compiled graph inside.
        """
        current = self._current()
        sites = sites_of(current, measured=True)
        graphs = tuple(entry.described() for entry, _ in current)
        return Report(tuple(sites), graphs, (*self.notes, *self._hints(sites, not_reached), *self._outside()))

    def _current(self) -> list[tuple[ReportEntry, int]]:
        """Returns the entries that there are now, each with its calls: another thread may train meanwhile."""
        with self._lock:
            counted = [(entry, self.calls(entry)) for entry in self.entries]
            return [(entry, calls) for entry, calls in counted if calls or not entry.of_phase]

    def _outside(self) -> list[str]:
        """Returns notes about embeddings that are exchanged outside of graphs."""
        with self._lock:
            encoded = sorted(self._encoded.items())
        notes = [Note.ENCODED.format(name=name, count=count, before=before, after=after) for name, (count, before, after) in encoded]
        return [*notes, *torchrec_notes()]

    def _hints(self, sites: Sequence[SiteReport], not_reached: Callable[[], Sequence[str]]) -> list[str]:
        """Returns notes about what is missing, as far as is known by now."""
        if not self.called:
            return [NOTHING_COMPILED]
        averaged = {id(parameter) for ref in self._averaged if (parameter := ref()) is not None}
        ignored = dict.fromkeys(name for name, ref in self._ignored if (parameter := ref()) is not None and id(parameter) not in averaged)
        hints = [Note.IGNORED.format(parameters=abbreviated(list(ignored)))] if ignored else []
        hints += self.patterns.notes(sites)
        if unsized := sum(0 in site.shape for site in sites):
            hints.append(Note.RUN_TIME_ROWS.format(count=unsized))
        if names := not_reached():
            return [*hints, NOT_REACHED.format(modules=", ".join(names))]
        advised = self.trains_alone and not self.has_shards and not any(site.kind == "gradient" for site in sites)
        return [*hints, GRADIENTS_OUTSIDE] if advised else hints
