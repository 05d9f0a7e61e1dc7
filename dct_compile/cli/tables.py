"""The tables of ``dct train``, as headers and rows of text: printed on the terminal and put into the report."""

from dataclasses import dataclass
from statistics import mean, stdev

from dct_compile.cli.results import KINDS, RARE, BackendResult, Results, bytes_until
from dct_compile.link import duration, parse
from dct_compile.models.tasks import Metric


@dataclass(frozen=True)
class Table:
    """A titled table; ``note`` says what its numbers are."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""


def quality(results: Results) -> Table:
    """Test metrics, replicas and speed, one row per backend."""
    rows, settings = [], results.settings
    for result in results.backends:
        checks = sum(run.replica_checks for run in result.runs)
        rows.append(
            [
                result.backend,
                f"{settings['rates'].get(result.backend, settings['lr']):g}",
                *(_spread(result.mean_and_spread(metric.name), 4) for metric in results.metrics),
                _spread(result.mean_and_spread("steps_per_second"), 1),
                f"identical ({checks} checks)",
            ]
        )
    rows += _differences(results)
    seeds = settings["seeds"]
    note = (
        f"Mean and standard deviation over {seeds} seeds. " if seeds > 1 else "One seed: no spread. "
    ) + f"{settings['dp']} data-parallel x {settings['mp']} model-parallel ranks on {results.environment['cores']} cores, gloo. "
    titles = [metric.title for metric in results.metrics]
    note += f"Better: {', '.join(f'{_direction(metric)} {metric.title}' for metric in results.metrics)}."
    return Table("Quality and speed", ["backend", "rate", *titles, "steps/s", "replicas"], rows, note)


def sent(results: Results) -> Table | None:
    """Returns the bytes that a rank sends with each backend; ``None`` where none is known, or none is sent."""
    known = [(result, results.sent(result)) for result in results.backends]
    known = [(result, pieces) for result, pieces in known if pieces and pieces[-1][1]]
    dense = next((pieces[-1][1] for result, pieces in known if result.backend == "dense"), None)
    rows = []
    for result, pieces in known:
        per_step, steps = pieces[-1][1], result.runs[0].steps
        rows.append(
            [
                result.backend,
                f"{per_step:,.0f}" + (f" from step {pieces[-1][0]} on" if len(pieces) > 1 else ""),
                f"{dense / per_step:.1f}x" if dense else "-",
                f"{bytes_until(pieces, steps)[-1] / 2**20:,.2f}",
                "computed from shapes" if result.computed_bytes else "counted by dct",
            ]
        )
    headers = ["backend", "bytes per step", "fewer than dense", "MiB per run", "known by"]
    note = "Sent per rank, mean over ranks, all_reduce as a ring."
    return Table("Bytes sent", headers, rows, note) if rows else None


def traffic(results: Results) -> Table | None:
    """Bytes per step, dense and with DCT; ``None`` where DCT was not run, since only its backend counts them."""
    dct = results.get("dct")
    if dct is None or not any(dct.sites):
        return None
    rows = [_bytes_row(f"{name}s", dct, kinds) for name, kinds in KINDS.items() if name not in RARE or dct.bytes_of("dense_bytes", kinds)]
    rows.append(_bytes_row("all", dct, [kind for kinds in KINDS.values() for kind in kinds]))
    note = "Sent per rank and training step, mean over ranks, indices and other metadata included, forward and backward."
    return Table("Bytes on the wire", ["traffic", "dense", "dct", "ratio"], rows, note)


def link(results: Results) -> Table | None:
    """Returns the predicted seconds per step on the link that was assumed, and what this machine's own link would change."""
    dct = results.get("dct")
    if dct is None or not any(dct.sites):
        return None
    weighed = [site for site in dct.sites[0] if site["seconds"] is not None]
    assumed = parse(results.settings["options"].get("link"))
    name = str(assumed) if assumed is not None else "measured" if weighed else "none: the bytes decide"
    dense, compressed = (sum(site["calls"] * site[field] for site in weighed) for field in ("dense_seconds", "seconds"))
    row = [name, *((duration(dense), duration(compressed), f"{dense / compressed:.1f}x") if weighed and compressed else ("-", "-", "-"))]
    note = "Predicted per step for the collectives that DCT can carry, by hops, bytes and passes over memory, where nothing else runs. "
    return Table(
        "Seconds on the link",
        ["link", "dense", "dct", "ratio"],
        [row],
        note + f"The link here: {results.environment['link']}.",
    )


def sites(results: Results) -> Table | None:
    """Returns every collective of the training graphs of rank 0."""
    dct = results.get("dct")
    if dct is None or not any(dct.sites):
        return None
    rows = []
    for site in dct.sites[0]:
        ratio = f"{site['dense_bytes'] / site['wire_bytes']:.1f}x" if site["wire_bytes"] else "-"
        rows.append(
            [
                site["collective"],
                site["kind"],
                site["name"],
                "x".join(map(str, site["shape"])),
                site["decision"],
                f"{site['dense_bytes']:,}",
                f"{site['wire_bytes']:,}",
                ratio,
                "-" if site["density"] is None else f"{site['density']:.4f}",
                "-" if site["overflow"] is None else f"{site['overflow']:,}",
                site["reason"],
            ]
        )
    headers = ["collective", "kind", "name", "shape", "decision", "dense B", "wire B", "ratio", "density", "overflow", "reason"]
    return Table("Sites", headers, rows, "Rank 0, last seed; bytes per call. Density: achieved, over the run.")


def _differences(results: Results) -> list[list[str]]:
    """Each backend less dense, seed by seed: both train on the same samples, so the spread of splits and orders drops out."""
    dense = results.get("dense")
    if dense is None:
        return []
    rows = []
    for result in results.backends:
        if result is dense:
            continue
        cells = []
        for metric in results.metrics:
            values = [b.metrics[metric.name] - a.metrics[metric.name] for a, b in zip(dense.runs, result.runs, strict=True)]
            cells.append(_spread((mean(values), stdev(values) if len(values) > 1 else None), 4, sign="+"))
        rows.append([f"{result.backend} - dense", "", *cells, "", ""])
    return rows


def _direction(metric: Metric) -> str:
    return "higher" if metric.higher_is_better else "lower"


def _bytes_row(name: str, result: BackendResult, kinds: list[str] | tuple[str, ...]) -> list[str]:
    dense, wire = result.bytes_of("dense_bytes", kinds), result.bytes_of("wire_bytes", kinds)
    return [name, f"{dense:,.0f}", f"{wire:,.0f}", f"{dense / wire:.1f}x" if wire else "-"]


def _spread(value: tuple[float, float | None], digits: int, sign: str = "") -> str:
    average, deviation = value
    return f"{average:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
