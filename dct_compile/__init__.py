"""Communication-compressing compilation: ``torch.compile(model, backend="dct")`` (Dynamic Communication Thresholding [Gupta21]).

Nothing is imported before it is used: torch takes seconds, and neither ``dct --help`` nor a program's start needs it.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dct_compile.api import (
        adapt,
        discard_gradients,
        drain,
        load_state_dict,
        report,
        reset_report,
        scale_residuals,
        state_dict,
    )
    from dct_compile.audit import Audit, AuditError, AuditResult, audit
    from dct_compile.checkpoint import LoadPlanner
    from dct_compile.config import DCTConfig
    from dct_compile.embeddings import all_to_all_single, torchrec_sharder
    from dct_compile.inspection import explain
    from dct_compile.monitor import Monitor, SiteStats, monitor
    from dct_compile.report import GraphReport, NodeReport, Report, ReportDiff, SiteReport
    from dct_compile.state.ranks import StateDict

__all__ = [
    "Audit",
    "AuditError",
    "AuditResult",
    "DCTConfig",
    "GraphReport",
    "LoadPlanner",
    "Monitor",
    "NodeReport",
    "Report",
    "ReportDiff",
    "SiteReport",
    "SiteStats",
    "StateDict",
    "adapt",
    "all_to_all_single",
    "audit",
    "discard_gradients",
    "drain",
    "explain",
    "load_state_dict",
    "monitor",
    "report",
    "reset_report",
    "scale_residuals",
    "state_dict",
    "torchrec_sharder",
]

_NAMES = {
    "api": (
        "adapt",
        "discard_gradients",
        "drain",
        "load_state_dict",
        "report",
        "reset_report",
        "scale_residuals",
        "state_dict",
    ),
    "audit": ("Audit", "AuditError", "AuditResult", "audit"),
    "checkpoint": ("LoadPlanner",),
    "config": ("DCTConfig",),
    "embeddings": ("all_to_all_single", "torchrec_sharder"),
    "inspection": ("explain",),
    "monitor": ("Monitor", "SiteStats", "monitor"),
    "report": ("GraphReport", "NodeReport", "Report", "ReportDiff", "SiteReport"),
    "state.ranks": ("StateDict",),
}
"""The public names by the module that holds them."""
_HOME = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports what a public name or a module of this package stands for."""
    if name in _HOME:
        globals()[name] = getattr(import_module(_HOME[name]), name)
        return globals()[name]
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(ModuleType):
    """This package. The functions ``audit``, ``monitor`` and ``report`` have the names of modules, whose import must not hide them."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
