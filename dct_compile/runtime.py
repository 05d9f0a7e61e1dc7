"""The one place of process-wide state: compressor state, the report, and what has been settled with other ranks."""

import logging
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.agreement import Agreement
from dct_compile.report import ReportRegistry
from dct_compile.state_store import StateStore
from dct_compile.workers import Workers

log = logging.getLogger("dct_compile")


@dataclass
class Runtime:
    """``torch.compile`` hands a backend nothing that outlives a compilation, so what must outlive it is kept here.

    ``synchronised``: the parameters that ``data_parallel`` has made equal on all ranks. ``agreed``: for each group, the parameters of
    graphs that its ranks have agreed on.
    """

    states: StateStore = field(default_factory=StateStore)
    reports: ReportRegistry = field(default_factory=ReportRegistry)
    agreement: Agreement = field(default_factory=Agreement)
    workers: Workers = field(default_factory=Workers)
    synchronised: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    agreed: "WeakKeyDictionary[ProcessGroup, WeakTensorKeyDictionary]" = field(default_factory=WeakKeyDictionary)

    def warn_once(self, note: str) -> None:
        """Adds a note to the report and logs it as a warning, once."""
        if note not in self.reports.notes:
            log.warning("%s", note)
            self.reports.note(note)


RUNTIME = Runtime()
