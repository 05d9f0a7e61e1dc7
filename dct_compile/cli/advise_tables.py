"""The tables of ``dct advise``, as text."""

import math
from typing import Any

from tabulate import tabulate

from dct_compile.advice import METHODS, Sent
from dct_compile.cli.advise_numbers import KINDS, LATE, TRAFFICS, Case, at_scale, recommended
from dct_compile.link import duration, rate


def tables(case: Case, *, scale: bool) -> str:
    """Returns all that is printed. ``scale``: with the tables over ranks."""
    parts = [_head(case), _by_kind(case), _steps(case), _crossings(case), _memory(case)]
    if scale:
        parts += _scale(case)
    return "\n\n".join([*parts, _advice(case), *(f"note: {note}" for note in case.notes)])


def _head(case: Case) -> str:
    training = case.training
    link = f"{case.link} per hop, {'measured' if case.is_measured else 'assumed'}"
    if math.isinf(case.link.bytes_per_s):
        link = "none, as all ranks are on one machine; the time that data takes through its memory is not counted"
    how = "timed on this machine: median of 5, eager, one rank" if case.timed else "as given"
    copies = f", {training.data_parallel_ranks} data parallel" if training.data_parallel_ranks not in (1, case.ranks) else ""
    return f"{case.target}, {case.ranks} ranks{copies}\nlink: {link}\ncomputation: {duration(training.compute_s)} per step, {how}"


def _by_kind(case: Case) -> str:
    sent = case.sent()
    rows = [_row(case, kind, part, sent) for kind, part in TRAFFICS.items() if getattr(sent["dense"], part).messages]
    if not rows:
        return "No rank sends anything."
    headers = ["sent per rank and step", "messages", *(f"{method} B" for method in METHODS), *(f"{method} time" for method in METHODS)]
    return _table(rows, headers)


def _row(case: Case, kind: str, part: str, sent: dict[str, Sent]) -> list[str]:
    traffics = [getattr(sent[method], part) for method in METHODS]
    messages = str(traffics[0].messages)
    if traffics[2].messages != traffics[0].messages:
        messages += f", dct {traffics[2].messages}"
    sizes, seconds = ([f"{item.wire_bytes:,}" for item in traffics], [duration(case.seconds(item)) for item in traffics])
    return [kind, messages, *sizes, *seconds]


def _steps(case: Case) -> str:
    dense_s = case.step_s("dense")
    rows = [[method, duration(case.step_s(method)), f"{case.step_s(method) / dense_s:.0%}"] for method in (*METHODS, LATE)]
    table = _table(rows, ["step", "time", "of dense"])
    better = case.training.smaller_buckets(case.link)
    if better is None:
        return table
    size = f"buckets of {better.mib} MiB (DDP: bucket_cap_mb={better.mib}; data_parallel takes them where the link is known)"
    return f"{table}\n{size} would save up to {duration(better.saved_s)}"


def _crossings(case: Case) -> str:
    present = [kind for kind, part in TRAFFICS.items() if kind in KINDS and getattr(case.sent()["dense"], part).messages]
    return "\n".join(f"{kind}: {_crossing(case.crossing(kind))}" for kind in present)


def _crossing(bytes_per_s: float) -> str:
    if bytes_per_s == 0:
        return "compressed at no rate"
    return "compressed at every rate" if math.isinf(bytes_per_s) else f"compressed up to {rate(bytes_per_s)}, dense on faster links"


def _memory(case: Case) -> str:
    sizes = case.training.state_bytes(case.link)
    if not sizes:
        return "memory: no state, as no gradient is compressed on this link"
    named = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    return f"memory: {sum(sizes.values()):,} B of state per rank ({named})"


def _scale(case: Case) -> list[str]:
    if case.training.data_parallel_ranks == 1:
        return ["No gradient is averaged, so there is nothing to show over ranks."]
    rows = at_scale(case)
    methods = list(next(iter(rows.values())))
    sizes = [[ranks, *(f"{row[method].wire_bytes:,}" for method in methods)] for ranks, row in rows.items()]
    seconds = [[ranks, *(duration(case.seconds(row[method])) for method in methods)] for ranks, row in rows.items()]
    headers = ["data-parallel ranks", *methods]
    return [
        f"Gradients: bytes that a rank sends per step\n{_table(sizes, headers)}",
        f"Gradients: communication per step on this link\n{_table(seconds, headers)}",
    ]


def _advice(case: Case) -> str:
    options, why = recommended(case)
    if options is None:
        return f"advice: leave it dense. {why}"
    shown = f"options={options!r}" if options else "nothing to set: the default link='auto' measures this link"
    return f'advice: backend="dct", {shown}. {why}'


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    return tabulate(rows, headers, disable_numparse=True, colalign=["left", *["right"] * (len(headers) - 1)])
