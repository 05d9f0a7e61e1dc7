"""Tables and pictures of training steps on slow links."""

import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from slow_cells import METHODS, RATES, Cell, Result
from slow_training import Point, Training
from tabulate import tabulate

_Place = tuple[int, str, str]
_NO_LIMIT_AT = 1e11
"""The place of an unlimited link in a picture."""

_COLUMNS = {
    **{"step s": ".4f", "q1": ".4f", "q3": ".4f", "x dense": ".2f", "compute s": ".4f", "other %": ".0f"},
    **{"CPU s": ".4f", "compute CPU s": ".4f", "predicted s": ".4f", "B sent": "", "B computed": ""},
}
"""Numbers of a table and their formats."""


def grouped(results: dict[Cell, Result], model: str) -> dict[_Place, list[tuple[Cell, Result]]]:
    """Returns the repetitions of each (hosts, rate, method), in the order of hosts, rates and methods."""
    order = sorted((cell for cell in results if cell.model == model), key=_order)
    found: dict[_Place, list[tuple[Cell, Result]]] = defaultdict(list)
    for cell in order:
        found[cell.hosts, cell.rate, cell.method].append((cell, results[cell]))
    return found


def step_s(repeats: list[tuple[Cell, Result]]) -> float:
    """Returns the median over repetitions of the median step."""
    times = [result.median_s for _, result in repeats if not result.error]
    return statistics.median(times) if times else float("nan")


def print_steps(results: dict[Cell, Result], model: str) -> None:
    """Prints the steps of ``model``: medians over the repetitions, and quartiles of the steps."""
    places = grouped(results, model)
    rows: list[list[object]] = []
    errors: list[float] = []
    for (hosts, rate, method), repeats in places.items():
        good = [(cell, result) for cell, result in repeats if not result.error]
        if not good:
            rows.append([hosts, rate, method, repeats[-1][1].error])
            continue
        step, q1, q3 = step_s(good), _median(good, "q1_s"), _median(good, "q3_s")
        compute, sent = statistics.median(result.compute_on(hosts) for _, result in good), _median(good, "sent_bytes")
        cpu, least_cpu = _median(good, "cpu_s"), _median(good, "compute_cpu_s")
        predicted = [seconds for cell, result in good if (seconds := result.predicted_s(cell)) is not None]
        errors += [abs(seconds / result.median_s - 1) for cell, result in good if (seconds := result.predicted_s(cell)) is not None]
        dense = step_s(places.get((hosts, rate, next(iter(METHODS))), []))
        computed = good[-1][1].computed_bytes
        other, expected = 100 * (1 - compute / step), statistics.median(predicted or [float("nan")])
        numbers: list[object] = [step, q1, q3, dense / step, compute, other, cpu, least_cpu, expected, round(sent)]
        numbers.append("" if computed < 0 else round(computed))
        rows.append([hosts, rate, method, *numbers])
    print(f"\n{model}: seconds of a step; compute is that of the dense step without communication, on the cores that the hosts share")
    print(tabulate(rows, ["hosts", "rate", "method", *_COLUMNS], floatfmt=("", "", "", *_COLUMNS.values())))
    if errors:
        print(f"median relative error of the prediction: {100 * statistics.median(errors):.0f} %")


def draw_steps(results: dict[Cell, Result], model: str, path: Path) -> None:
    """Draws the step over the rate: a panel for each number of hosts, a line for each method, and the step without communication."""
    # Rates in the order of RATES, so that lines go from left to right.
    places = dict(sorted(grouped(results, model).items(), key=lambda item: list(RATES).index(item[0][1])))
    sizes = sorted({hosts for hosts, _, _ in places})
    mpl.use("agg")
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4.5), sharey=True, layout="constrained", squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for method in dict.fromkeys(method for hosts, _, method in places if hosts == size):
            own = {rate: repeats for (hosts, rate, name), repeats in places.items() if (hosts, name) == (size, method)}
            x = [RATES[rate] or _NO_LIMIT_AT for rate in own]
            axis.plot(x, [step_s(repeats) for repeats in own.values()], "o-", label=method, color=_color(method))
        computes = [
            result.compute_on(size) for key, repeats in places.items() if key[0] == size for _, result in repeats if not result.error
        ]
        if computes:
            axis.axhline(statistics.median(computes), color="black", linestyle=":", label="no communication")
        shown = [name for name in RATES if any(rate == name for _, rate, _ in places)]
        axis.set(xscale="log", yscale="log", title=f"{size} hosts", xlabel="rate of a link")
        axis.set_xticks([RATES[name] or _NO_LIMIT_AT for name in shown], shown)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"seconds of a step, {model}")
    shown_lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown_lines.values(), shown_lines, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=110)


def first_at(curve: list[Point], aim: float) -> Point | None:
    """Returns the first point of a curve whose loss is ``aim`` or less: dense training, too, may be there before its last step."""
    return next((point for point in curve if point.loss <= aim), None)


def print_losses(trainings: dict[Training, list[Point]], model: str) -> None:
    """Prints the time to the loss of dense training."""
    rows: list[list[object]] = []
    chosen = {training: curve for training, curve in trainings.items() if training.model == model}
    for training, curve in chosen.items():
        end = first_at(curve, training.aim)
        dense = next(first_at(points, training.aim) for other, points in chosen.items() if _is_dense_of(other, training))
        shown: list[object] = [f"not in {curve[-1].step}", curve[-1].seconds, ""]
        if end is not None and dense is not None:
            shown = [end.step, end.seconds, dense.seconds / end.seconds]
        row = [training.hosts, training.rate, training.method, training.seed, training.aim]
        rows.append([*row, *shown, curve[-1].seconds / curve[-1].step])
    print(f"\n{model}: time to the training loss of dense training (mean of the last steps)")
    columns = ["hosts", "rate", "method", "seed", "loss", "steps", "seconds", "x faster than dense", "s per step"]
    print(tabulate(rows, columns, floatfmt=".4g"))


def draw_losses(trainings: dict[Training, list[Point]], model: str, path: Path) -> None:
    """Draws the loss over seconds, one panel for each number of hosts and rate, of the first seed."""
    chosen = {training: curve for training, curve in trainings.items() if training.model == model and training.seed == 0}
    places = sorted({(training.hosts, training.rate) for training in chosen}, key=lambda place: (place[0], list(RATES).index(place[1])))
    mpl.use("agg")
    figure, axes = plt.subplots(1, len(places), figsize=(6 * len(places), 4.5), layout="constrained", squeeze=False)
    for axis, place in zip(axes[0], places, strict=True):
        for training, curve in chosen.items():
            if (training.hosts, training.rate) == place:
                axis.plot(
                    [point.seconds for point in curve],
                    [point.loss for point in curve],
                    label=training.method,
                    color=_color(training.method),
                )
                axis.axhline(training.aim, color="black", linestyle=":", linewidth=0.8)
        axis.set(xscale="log", xlabel="seconds of training", ylabel="training loss, nats", title=f"{place[0]} hosts, {place[1]}")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _median(repeats: list[tuple[Cell, Result]], name: str) -> float:
    return float(statistics.median(getattr(result, name) for _, result in repeats))


def _color(method: str) -> str:
    """Returns the color of a method, the same in all pictures."""
    return f"C{list(METHODS).index(method)}"


def _order(cell: Cell) -> tuple[int, int, int, int]:
    return cell.hosts, list(RATES).index(cell.rate), list(METHODS).index(cell.method), cell.repeat


def _is_dense_of(dense: Training, training: Training) -> bool:
    same = (dense.model, dense.hosts, dense.rate, dense.seed, dense.dense_steps)
    return dense.method == next(iter(METHODS)) and same == (
        training.model,
        training.hosts,
        training.rate,
        training.seed,
        training.dense_steps,
    )
