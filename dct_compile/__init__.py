"""Communication-compressing compilation: ``torch.compile(model, backend="dct")`` (Dynamic Communication Thresholding [Gupta21])."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.monitor import Monitor, SiteStats, monitor
from dct_compile.report import GraphReport, NodeReport, Report, ReportDiff, SiteReport
from dct_compile.runtime import RUNTIME
from dct_compile.state_store import StateDict

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
    """Reports the effect of ``torch.compile(model, backend="dct", options=options)`` on a call with these inputs.

    Compiles forward and backward for ``ranks`` ranks, and runs neither. No other process is needed. Parameters, buffers, gradients and
    torch's random generators stay as they are.

    Args:
        model: The module or function to compile.
        inputs: The positional arguments of ``model``.
        options: The options of backend "dct", see :class:`DCTConfig`, and those of Inductor.
        ranks: The number of ranks to simulate, by default 4. An initialised process group is used with its own ranks.
        named_inputs: The keyword arguments of ``model``.

    Returns:
        The report of the graphs and of their collectives.

    Raises:
        ValueError: An option is not allowed, ``ranks`` is less than 1, or ``ranks`` differs from the size of the process group.
        TypeError: ``model`` cannot be called.
        Exception: Any error that ``model`` raises. See :func:`dct_compile.inspection.explain` for details.
    """
    # Late: the backend takes seconds to import, which programs that only call torch.compile pay when they compile.
    from dct_compile import inspection

    return inspection.explain(model, *inputs, options=options, ranks=ranks, **named_inputs)


def report() -> Report:
    """Returns the report of all compilations by backend "dct" in this process, with the densities achieved so far.

    ``str(report())`` is a table.
    """
    return RUNTIME.report()


def reset_report() -> None:
    """Forgets the reports so far. Graphs that are already compiled go on, and are not reported again."""
    RUNTIME.reports.clear()


def state_dict(model: nn.Module) -> StateDict:
    """Returns this rank's compressor state. Every rank has its own state to save.

    Args:
        model: The model whose parameters are compressed.

    Returns:
        Copies of residuals, thresholds and counters, keyed by parameter name.
    """
    return RUNTIME.states.state_dict(model)


def load_state_dict(model: nn.Module, state: StateDict) -> None:
    """Restores the result of :func:`state_dict`, before or after the first compilation.

    Args:
        model: The model that the state belongs to.
        state: The state by parameter name. An empty dict resets the model's state.

    Raises:
        ValueError: The state has a parameter that the model does not have, or a residual of another size.
    """
    RUNTIME.states.load_state_dict(model, state)
