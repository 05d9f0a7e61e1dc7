"""The picture of ``dct tune``: loss over seconds per step, and the front."""

import io

from matplotlib import rc_context
from matplotlib.figure import Figure

from dct_compile.cli.tune_search import Goal, Tried, front


def draw(target: str, dense: Tried, tried: list[Tried], goal: Goal) -> bytes:
    """Returns the picture as PNG: a point for each trial, a line along the front, dense, and the bound of the loss."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10, "axes.titlesize": 10}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(6.4, 4.2), dpi=140, layout="constrained")
        axes = figure.add_subplot()
        steps = front([dense, *tried])
        axes.plot(*_places(steps), color="#2a6fb0", linewidth=1.2, drawstyle="steps-post", label="front")
        axes.scatter(*_places(tried), color="#2a6fb0", s=18, label="trial")
        axes.scatter(*_places([dense]), color="#8a6d1a", marker="D", s=36, label="dense", zorder=3)
        best = goal.best([dense, *tried])
        if best is not None:
            axes.scatter(*_places([best]), facecolor="none", edgecolor="#b03a5b", s=110, label="best", zorder=4)
        axes.axhline(goal.bound, color="#888888", linestyle="--", linewidth=1, label="largest loss allowed")
        axes.grid(color="#333333", alpha=0.12)
        axes.set(xlabel="seconds per step", ylabel="loss", title=f"{target}: loss and time of {len(tried)} trials")
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _places(tried: list[Tried]) -> tuple[list[float], list[float]]:
    return [trial.seconds for trial in tried], [trial.measured.loss for trial in tried]
