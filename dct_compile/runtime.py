"""The one place of process-wide state: compressor state, the report, and what has been settled with other ranks."""

from dataclasses import dataclass, field

from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.agreement import Agreement
from dct_compile.report import ReportRegistry
from dct_compile.state import StateStore


@dataclass
class Runtime:
    """``torch.compile`` hands a backend nothing that outlives a compilation, so what must outlive it is kept here.

    ``synchronised``: the parameters that ``data_parallel`` has made equal on all ranks.
    """

    states: StateStore = field(default_factory=StateStore)
    reports: ReportRegistry = field(default_factory=ReportRegistry)
    agreement: Agreement = field(default_factory=Agreement)
    synchronised: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)


RUNTIME = Runtime()
