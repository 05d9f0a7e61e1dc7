"""The picture of ``dct advise``: step time over the rate of the link, and over ranks."""

import io
import math

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dct_compile.cli.advise_numbers import LATE, RANKS, Case
from dct_compile.link import duration, rate

_SLOWEST, _FASTEST = 10e6 / 8, 400e9 / 8
"""Bytes per second: 10 Mbit/s to 400 Gbit/s."""
_RATES = 41
_STYLES = {
    "dense": ("#8a6d1a", "-"),
    "fp16": ("#4a8a3c", "-"),
    "dct": ("#2a6fb0", "-"),
    LATE: ("#7d4fb0", "--"),
}


def draw(case: Case) -> bytes:
    """Returns the picture as PNG: step time over bandwidth on the left, over data-parallel ranks on the right."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10, "axes.titlesize": 10}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, 4.2), dpi=140, layout="constrained")
        left, right = figure.subplots(1, 2)
        _over_rates(left, case)
        if case.training.data_parallel_ranks > 1:
            _over_ranks(right, case)
        else:
            right.set_axis_off()
            right.set_title("no gradient is averaged")
        left.legend()
        figure.suptitle(f"{case.target}: predicted time of a training step, {duration(case.training.compute_s)} of it computation")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _over_rates(axes: Axes, case: Case) -> None:
    rates = np.geomspace(_SLOWEST, _FASTEST, _RATES)
    for method, (color, line) in _STYLES.items():
        axes.plot(rates, [case.step_s(method, case.at_rate(float(one))) for one in rates], color=color, linestyle=line, label=method)
    if math.isfinite(case.link.bytes_per_s):
        axes.axvline(case.link.bytes_per_s, color="#666666", linestyle=":", linewidth=1)
        axes.text(case.link.bytes_per_s, 0.98, " this link", transform=axes.get_xaxis_transform(), color="#666666", va="top", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks([10.0**power / 8 for power in range(7, 12)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    axes.set(xlabel="rate of the link", title=f"{case.ranks} ranks")
    _finish(axes)


def _over_ranks(axes: Axes, case: Case) -> None:
    link = case.link if math.isfinite(case.link.bytes_per_s) else case.at_rate(1e9 / 8)
    for method, (color, line) in _STYLES.items():
        axes.plot(RANKS, [case.step_s(method, link, ranks) for ranks in RANKS], color=color, linestyle=line, label=method, marker=".")
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(ranks) for ranks in RANKS])
    axes.set(xlabel="data-parallel ranks", title=f"link of {link}")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("step (log scale)")
    axes.grid(axis="y", alpha=0.2)
