"""The plot of ``dct bench kernels``: achieved bandwidth over size, beside the bandwidth of a copy."""

import io
from collections.abc import Sequence
from math import log
from statistics import median

import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from dct_compile.bench.inputs import CONFIG
from dct_compile.bench.kernels import Measurement

_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 9}
_MARKERS = "osD^v<>P*Xphd"


def draw_roofline(measurements: Sequence[Measurement], caption: str) -> bytes:
    """Returns a PNG image: panels for the ops on gradients and on rows, and for each dtype; in each a line for each op.

    Shown is the measured density that is nearest to the backend's default. ``caption``: machine and versions. At least one of the
    measurements must have been run.
    """
    families = _families([item for item in measurements if item.timings and item.case.streams])
    dtypes = list(dict.fromkeys(item.problem.dtype for item in measurements))
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(7.5 * len(families), 2.6 + 3.8 * len(dtypes)), dpi=130, layout="constrained")
        figure.suptitle(f"Memory bandwidth: the floor of an op's traffic over its median time\n{caption}", fontsize=10)
        grid = figure.subplots(len(dtypes), len(families), squeeze=False, sharex=True, sharey=True)
        for column, (family, items) in zip(grid.T, families.items(), strict=True):
            for axes, dtype in zip(column, dtypes, strict=True):
                _panel(axes, items, dtype)
                axes.set_title(f"{family}, {str(dtype).removeprefix('torch.')}", fontsize=9)
            column[-1].set_xlabel("elements")
            column[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8)
        for axes in grid[:, 0]:
            axes.set_ylabel("GB/s")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _families(measured: list[Measurement]) -> dict[str, list[Measurement]]:
    """Returns what is shown, by the title of its column; a family of which nothing was measured has none."""
    families = {}
    for name, has_rows, default in (("ops on gradients", False, CONFIG.dp_density), ("ops on rows", True, CONFIG.mp_density)):
        items = [item for item in measured if bool(item.case.widths) == has_rows]
        densities = {item.problem.density for item in items if item.case.has_density}
        chosen = min(densities, key=lambda density: abs(log(density / default)), default=None)
        shown = [item for item in items if item.problem.density == chosen or not item.case.has_density]
        if shown:
            families[name if chosen is None else f"{name}, density {chosen:g}"] = shown
    return families


def _panel(axes: Axes, items: list[Measurement], dtype: torch.dtype) -> None:
    titles = list(dict.fromkeys(item.case.title(item.problem) for item in items))
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, title in enumerate(titles):
        line = [item for item in items if item.case.title(item.problem) == title and item.problem.dtype == dtype]
        sizes = [item.problem.numel for item in line]
        bandwidth = [item.bytes_per_s / 1e9 for item in line]
        style = {"color": colors[number % len(colors)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(sizes, bandwidth, label=title, linewidth=1.3, markersize=4, **style)
    copy = median(item.copy_bytes_per_s for item in items) / 1e9
    axes.axhline(copy, color="black", linestyle="--", linewidth=1, label=f"dst.copy_(src), {copy:.1f} GB/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.2, which="both")
