"""The plots of ``dct train`` as PNG images."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from dct_compile.cli.results import KINDS, BackendResult, Results, bytes_until

SMOOTHING = 25
"""Steps over which the loss is averaged for the eye."""
_LOSS_TITLE = f"Loss, mean of {SMOOTHING} steps; band: least to greatest of the seeds"
_SERIES = {
    False: {
        "dense": "#8a6d1a",
        "dct": "#2a6fb0",
        "fp16": "#4a8a3c",
        "powersgd-1": "#b03a5b",
        "powersgd-2": "#7d4fb0",
        "powersgd-4": "#c0661f",
    },
    True: {
        "dense": "#e0b94a",
        "dct": "#6fb3f2",
        "fp16": "#8fd07f",
        "powersgd-1": "#f27f9f",
        "powersgd-2": "#bd9bf0",
        "powersgd-4": "#f5a561",
    },
}
_INK = {False: "#333333", True: "#d5d5d5"}


def draw(results: Results, dark: bool) -> dict[str, bytes]:
    """PNG images by name, transparent, for a light or a dark page; only those for which there are numbers."""
    colors = _SERIES[dark]
    images = {"loss": _figure(lambda axes: _loss(axes, results, colors), dark)}
    if sum(any(size for _, size in results.sent(result)) for result in results.backends) > 1:
        images["loss-over-bytes"] = _figure(lambda axes: _loss_over_bytes(axes, results, colors), dark)
    dct = results.get("dct")
    if dct is not None and any(dct.sites):
        images["bytes"] = _figure(lambda axes: _bytes(axes, dct, colors), dark)
    if dct is not None and any(run.density for run in dct.runs):
        images["density"] = _figure(lambda axes: _density(axes, dct, colors["dct"]), dark)
    return images


def _figure(paint: Callable[[Axes], None], dark: bool) -> bytes:
    ink = _INK[dark]
    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = {**dict.fromkeys(names, ink), "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.4, 3.6), dpi=140, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=ink, alpha=0.15)
        axes.set_axisbelow(True)
        paint(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", transparent=dark, facecolor="none" if dark else "white")
    return buffer.getvalue()


def _loss(axes: Axes, results: Results, colors: dict[str, str]) -> None:
    for result in results.backends:
        steps, smooth = _smooth(result)
        _line(axes, steps, smooth, result.backend, colors)
    axes.set(xlabel="step", ylabel="training loss", title=_LOSS_TITLE)
    axes.title.set_fontsize(10)
    axes.legend()


def _loss_over_bytes(axes: Axes, results: Results, colors: dict[str, str]) -> None:
    for result in results.backends:
        pieces = results.sent(result)
        if not any(size for _, size in pieces):
            continue
        steps, smooth = _smooth(result)
        sent = np.array(bytes_until(pieces, int(steps[-1]))) / 2**20
        _line(axes, sent[steps - 1], smooth, result.backend, colors)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="MiB that a rank has sent (log scale)", ylabel="training loss", title=_LOSS_TITLE)
    axes.title.set_fontsize(10)
    axes.legend()


def _smooth(result: BackendResult) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the steps [n] at which a window ends, and the mean loss of each window for each seed [seeds, n]."""
    curves = np.array([run.losses for run in result.runs])
    window = min(SMOOTHING, curves.shape[1])
    smooth = np.array([np.convolve(curve, np.ones(window) / window, mode="valid") for curve in curves])
    return np.arange(window, curves.shape[1] + 1), smooth


def _line(axes: Axes, places: NDArray[Any], smooth: NDArray[np.float64], backend: str, colors: dict[str, str]) -> None:
    marker = "o" if len(places) == 1 else None  # a line of one point would not be seen
    axes.plot(places, smooth.mean(axis=0), color=colors[backend], label=backend, linewidth=1.4, marker=marker)
    axes.fill_between(places, smooth.min(axis=0), smooth.max(axis=0), color=colors[backend], alpha=0.2, linewidth=0)


def _bytes(axes: Axes, result: BackendResult, colors: dict[str, str]) -> None:
    shown = {name: kinds for name, kinds in KINDS.items() if result.bytes_of("dense_bytes", kinds)}
    places = np.arange(len(shown))
    for shift, (label, field) in zip((-0.2, 0.2), (("dense", "dense_bytes"), ("dct", "wire_bytes")), strict=True):
        values = [result.bytes_of(field, kinds) / 1024 for kinds in shown.values()]
        bars = axes.bar(places + shift, values, 0.38, color=colors[label], label=label)
        axes.bar_label(bars, [f"{value:,.1f}" for value in values], fontsize=8, padding=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{name}s" for name in shown])
    axes.set(ylabel="KiB per rank and step (log scale)", title="Bytes on the wire")
    axes.title.set_fontsize(10)
    axes.margins(y=0.15)
    axes.legend()


def _density(axes: Axes, result: BackendResult, color: str) -> None:
    for number, run in enumerate(result.runs):
        steps, density = zip(*run.density_between(), strict=True)
        axes.plot(steps, density, color=color, alpha=1 - 0.25 * min(number, 2), linewidth=1.2, label=f"seed {run.seed}")
    axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel="fraction sent", title="Achieved density of the gradients, rank 0, between two readings")
    axes.title.set_fontsize(10)
    axes.legend()
