"""The one place of process-wide state: compressor state, the report, and what has been settled with other ranks."""

import logging
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.agreement import Agreement
from dct_compile.config import DCTConfig
from dct_compile.reasons import Note
from dct_compile.report import Report, ReportRegistry, unreached_modules
from dct_compile.state import BucketState
from dct_compile.state_store import StateStore

log = logging.getLogger("dct_compile")


@dataclass
class Runtime:
    """``torch.compile`` hands a backend nothing that outlives a compilation, so what must outlive it is kept here.

    ``synchronised``: the parameters that ``data_parallel`` has made equal on all ranks. ``agreed``: for each group, the parameters of
    graphs that its ranks have agreed on. ``attached``: for each wrapper that an integration has decided about, what it keeps there. A copy
    of a wrapper takes nothing of that along.
    """

    states: StateStore = field(default_factory=StateStore)
    reports: ReportRegistry = field(default_factory=ReportRegistry)
    agreement: Agreement = field(default_factory=Agreement)
    synchronised: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    agreed: "WeakKeyDictionary[ProcessGroup, WeakTensorKeyDictionary]" = field(default_factory=WeakKeyDictionary)
    attached: "WeakKeyDictionary[nn.Module, Any]" = field(default_factory=WeakKeyDictionary)

    def report(self) -> Report:
        """Returns the report so far, with notes about all that the backend was not asked to compile."""
        return self.reports.snapshot(lambda: unreached_modules(self.attached))

    def begin_exchange(self, bucket: BucketState, config: DCTConfig, *, final: bool = False) -> None:
        """Prepares the state of ``bucket`` for an exchange: discarded gradients leave it, and it follows the scale of the loss.

        ``final``: whether other ranks apply the gradient, and this one has none of its own.
        """
        scale = self.states.use.scale(bucket.pending.uses)
        if not bucket.pending.begin(scale, config.undo_discarded and config.error_feedback, final):
            self.warn_once(Note.NO_OPTIMIZER)

    def warn_once(self, note: str) -> None:
        """Adds a note to the report and logs it as a warning, once."""
        if note not in self.reports.notes:
            log.warning("%s", note)
            self.reports.note(note)


RUNTIME = Runtime()
