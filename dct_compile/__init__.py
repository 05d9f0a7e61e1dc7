"""Communication-compressing compilation: ``torch.compile(model, backend="dct")`` (Dynamic Communication Thresholding [Gupta21])."""

from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.monitor import Monitor, SiteStats, monitor
from dct_compile.report import GraphReport, Report, SiteReport
from dct_compile.runtime import RUNTIME
from dct_compile.state import StateDict

__all__ = [
    "DCTConfig",
    "GraphReport",
    "Monitor",
    "Report",
    "SiteReport",
    "SiteStats",
    "load_state_dict",
    "monitor",
    "report",
    "reset_report",
    "state_dict",
]


def report() -> Report:
    """What backend "dct" has compiled in this process, with the densities achieved so far. ``str(report())`` is a table."""
    return RUNTIME.reports.snapshot()


def reset_report() -> None:
    """Forgets what has been reported; graphs that are already compiled go on and are not reported again."""
    RUNTIME.reports.clear()


def state_dict(model: nn.Module) -> StateDict:
    """This rank's compressor state (residuals, thresholds, counters), keyed by parameter name; every rank has its own to save."""
    return RUNTIME.states.state_dict(model)


def load_state_dict(model: nn.Module, state: StateDict) -> None:
    """Restores :func:`state_dict`'s result, before or after the first compilation; an empty dict resets the model's state.

    Raises ``ValueError`` for parameters that the model does not have and for residuals of another size.
    """
    RUNTIME.states.load_state_dict(model, state)
