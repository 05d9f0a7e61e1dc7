"""The one place of process-wide state: compressor state, the report, and what has been agreed with other ranks."""

from dataclasses import dataclass, field

from dct_compile.agreement import Agreement
from dct_compile.report import ReportRegistry
from dct_compile.state import StateStore


@dataclass
class Runtime:
    """``torch.compile`` hands a backend nothing that outlives a compilation, so what must outlive it is kept here."""

    states: StateStore = field(default_factory=StateStore)
    reports: ReportRegistry = field(default_factory=ReportRegistry)
    agreement: Agreement = field(default_factory=Agreement)


RUNTIME = Runtime()
