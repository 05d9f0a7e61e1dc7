"""The one place of process-wide state: compressor state, the report, and what has been settled with other ranks."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.agreement import Agreement
from dct_compile.config import DCTConfig
from dct_compile.groups import own_client
from dct_compile.links import Links
from dct_compile.optim import Bypass
from dct_compile.phases import phases_of
from dct_compile.posts import Signature
from dct_compile.reasons import Note
from dct_compile.report import Report, ReportRegistry, unreached_modules
from dct_compile.state.bucket import BucketState
from dct_compile.state.exchanges import signatures_of
from dct_compile.state.store import StateStore
from dct_compile.workers import Workers

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
    workers: Workers = field(default_factory=Workers)
    links: Links = field(default_factory=Links)
    synchronised: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    agreed: "WeakKeyDictionary[ProcessGroup, WeakTensorKeyDictionary]" = field(default_factory=WeakKeyDictionary)
    attached: "WeakKeyDictionary[Any, Any]" = field(default_factory=WeakKeyDictionary)

    bypass: Bypass = field(init=False)

    def __post_init__(self) -> None:
        self.bypass = Bypass(self.states.use, _note_optimizer)
        self.links.warn = self.warn_once

    def report(self) -> Report:
        """Returns the report so far, with notes about all that the backend was not asked to compile."""
        return self.reports.snapshot(lambda: unreached_modules(self.attached))

    def begin_exchange(self, bucket: BucketState, config: DCTConfig, *, final: bool = False) -> None:
        """Prepares the state of ``bucket`` for an exchange: discarded gradients leave it, and it follows the scale of the loss.

        ``final``: whether other ranks apply the gradient, and this one has none of its own.
        """
        late = bucket.spec.waits and config.error_feedback
        densities = bucket.spec.densities or (config.dp_density,) * len(bucket.pending.uses)
        for use, density in zip(bucket.pending.uses, densities, strict=True):
            use.late, use.waits, use.gap = late, late and config.bypasses(density), config.gap(density)
        bucket.follow(densities)
        if not bucket.pending.begin(config.undo_discarded and config.error_feedback, final):
            self.warn_once(Note.NO_OPTIMIZER)

    def agree_on_exchanges(self, group: ProcessGroup, config: DCTConfig, named: Sequence[tuple[str, Tensor]]) -> None:
        """Compares with the other ranks how often the gradients of these parameters were exchanged: the phases follow from it.

        Returns at once where that is known to be equal. It is not before the first exchange, nor after a state was loaded: then all ranks
        make this call.

        Args:
            group: The ranks that average the gradients.
            config: The options, with all phases.
            named: The parameters by name.

        Raises:
            RuntimeError: The ranks have other numbers, as after loading files of different steps, or other phases.
        """
        uses = self.states.use.of(parameter for _, parameter in named)
        if all(use.agreed for use in uses):
            return
        densities = ", ".join(f"{phase.config.dp_density:g} from exchange {phase.first} on" for phase in phases_of(config))
        numbers = signatures_of([(name, use) for (name, _), use in zip(named, uses, strict=True)])
        self.agreement.check(group, config.comparable(), [Signature("densities", densities, named[0][0]), *numbers], fresh=True)
        for use in uses:
            use.agreed = True

    def warn_once(self, note: str) -> None:
        """Adds a note to the report, once. The first rank that has it logs it as a warning, the others as information."""
        if note not in self.reports.notes:
            self.reports.note(note)
            log.log(logging.WARNING if _is_first(note) else logging.INFO, "%s", note)


def _is_first(note: str) -> bool:
    """Returns whether no other rank has asked for this note yet. Waits for nobody: a note of one rank alone is logged there."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return True
    try:
        return own_client().add(f"dct_compile/notes/{hashlib.sha256(note.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the store has gone with its rank
        return True


def _note_optimizer(optimizer: Optimizer, count: int) -> None:
    """Notes that ``optimizer`` steps ``count`` parameters without a first moment, or warns that it would have to (0)."""
    name = type(optimizer).__name__
    if count:
        RUNTIME.reports.note(Note.BYPASSED.format(optimizer=name, count=count))
    else:
        RUNTIME.warn_once(Note.UNKNOWN_OPTIMIZER.format(optimizer=name))


RUNTIME = Runtime()
