"""The report of compilations: every collective, the decision about it and its reason, the bytes it sends, and the graphs around it."""

from dct_compile.report.data import DeferredGraph, GraphReport, NodeReport, SiteReport, Sums, step_and_evaluation
from dct_compile.report.diff import ReportDiff
from dct_compile.report.entry import Measure, ReportEntry
from dct_compile.report.registry import GRADIENTS_OUTSIDE, NOT_REACHED, NOTHING_COMPILED, ReportRegistry
from dct_compile.report.report import Report
from dct_compile.report.unreached import unreached_modules, wrapped_class

__all__ = [
    "GRADIENTS_OUTSIDE",
    "NOTHING_COMPILED",
    "NOT_REACHED",
    "DeferredGraph",
    "GraphReport",
    "Measure",
    "NodeReport",
    "Report",
    "ReportDiff",
    "ReportEntry",
    "ReportRegistry",
    "SiteReport",
    "Sums",
    "step_and_evaluation",
    "unreached_modules",
    "wrapped_class",
]
