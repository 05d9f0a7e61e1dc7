"""The report of compilations: every collective, the decision about it and its reason, the bytes it sends, and the graphs around it."""

from dct_compile.report.data import DeferredGraph, GraphReport, NodeReport, SiteReport
from dct_compile.report.diff import ReportDiff
from dct_compile.report.registry import GRADIENTS_OUTSIDE, NOTHING_COMPILED, Measure, ReportEntry, ReportRegistry
from dct_compile.report.report import Report

__all__ = [
    "GRADIENTS_OUTSIDE",
    "NOTHING_COMPILED",
    "DeferredGraph",
    "GraphReport",
    "Measure",
    "NodeReport",
    "Report",
    "ReportDiff",
    "ReportEntry",
    "ReportRegistry",
    "SiteReport",
]
