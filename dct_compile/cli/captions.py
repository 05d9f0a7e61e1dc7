"""The sentences of the training report: its verdict, and the pictures in words."""

from statistics import mean, stdev

from dct_compile.cli.plots import SMOOTHING
from dct_compile.cli.results import KINDS, BackendResult, Results
from dct_compile.link import duration


def verdict(results: Results) -> str:
    """Returns one sentence about bytes, loss and step time: of dct, or of the first method that is not dense, against dense."""
    dense = results.get("dense")
    others = [result for result in results.backends if result is not dense]
    other = results.get("dct") or (others[0] if others else None)
    if dense is None or other is None:
        return f"Nothing is compared: {'dense was not trained' if dense is None else 'only dense was trained'}."
    parts = [_bytes(results, dense, other), _loss(results, dense, other), _time(dense, other)]
    return f"{other.backend} {'; '.join(part for part in parts if part)}."


def alternatives(results: Results) -> dict[str, str]:
    """Returns for each picture of :func:`dct_compile.cli.plots.draw` a text in its place."""
    ends = ", ".join(f"{result.backend} ends at {mean(_last(run.losses) for run in result.runs):.3f}" for result in results.backends)
    texts = {"loss": f"Training loss over {results.backends[0].runs[0].steps} steps: {ends}."}
    sent = {result.backend: results.sent(result) for result in results.backends}
    known = ", ".join(f"{name} {pieces[-1][1] / 1024:,.1f} KiB per step" for name, pieces in sent.items() if pieces)
    texts["loss-over-bytes"] = f"Training loss over the bytes that a rank has sent, log scale: {known}; {ends}."
    dct = results.get("dct")
    if dct is not None:
        rows = [
            f"{name}s {dct.bytes_of('dense_bytes', kinds) / 1024:,.1f} dense, {dct.bytes_of('wire_bytes', kinds) / 1024:,.1f} with dct"
            for name, kinds in KINDS.items()
            if dct.bytes_of("dense_bytes", kinds)
        ]
        texts["bytes"] = f"Bars of KiB per rank and step, log scale: {'; '.join(rows)}."
        windows = [window for run in dct.runs for _, window in run.density_between()]
        if windows:
            texts["density"] = f"Fraction of the gradients sent over the steps: from {min(windows):.4f} to {max(windows):.4f}."
    return texts


def _last(losses: list[float]) -> float:
    return mean(losses[-SMOOTHING:])


def _bytes(results: Results, dense: BackendResult, other: BackendResult) -> str:
    before, after = results.sent(dense), results.sent(other)
    if not before or not after or not after[-1][1]:
        return ""
    return f"sends {before[-1][1] / after[-1][1]:.1f} times fewer bytes than dense"


def _loss(results: Results, dense: BackendResult, other: BackendResult) -> str:
    metric = next((metric for metric in results.metrics if not metric.higher_is_better), results.metrics[0])
    before, after = ([run.metrics[metric.name] for run in result.runs] for result in (dense, other))
    difference = mean(after) - mean(before)
    way = "the same" if f"{difference:.4f}" in ("0.0000", "-0.0000") else f"{abs(difference):.4f} {'higher' if difference > 0 else 'lower'}"
    if len(before) < 2:
        return f"its {metric.title} is {way}, with one seed and so no spread to judge it by"
    spread = stdev(before)
    place = "within" if abs(difference) <= spread else "beyond"
    return f"its {metric.title} is {way}, which is {place} the spread of dense over {len(before)} seeds ({spread:.4f})"


def _time(dense: BackendResult, other: BackendResult) -> str:
    before, after = (1 / result.mean_and_spread("steps_per_second")[0] for result in (dense, other))
    return f"a step takes {duration(after)} here instead of {duration(before)}"
