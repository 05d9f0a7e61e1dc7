"""Communication-compressing compilation: ``torch.compile(model, backend="dct")`` (Dynamic Communication Thresholding [Gupta21])."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.monitor import Monitor, SiteStats, monitor
from dct_compile.report import GraphReport, NodeReport, Report, ReportDiff, SiteReport
from dct_compile.runtime import RUNTIME
from dct_compile.state import StateDict

__all__ = [
    "DCTConfig",
    "GraphReport",
    "Monitor",
    "NodeReport",
    "Report",
    "ReportDiff",
    "SiteReport",
    "SiteStats",
    "explain",
    "load_state_dict",
    "monitor",
    "report",
    "reset_report",
    "state_dict",
]


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, ranks: int | None = None, **named_inputs: Any
) -> Report:
    """What ``torch.compile(model, backend="dct", options=options)`` would do when it is called with these inputs.

    Compiles forward and backward for ``ranks`` ranks (default 4; where a process group is initialised: its own) and runs neither: needs no
    other process, and leaves parameters, buffers, gradients and torch's random generators as they are. See
    :func:`dct_compile.inspection.explain` for details and errors.
    """
    # Late: the backend takes seconds to import, which programs that only call torch.compile pay when they compile.
    from dct_compile import inspection

    return inspection.explain(model, *inputs, options=options, ranks=ranks, **named_inputs)


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
