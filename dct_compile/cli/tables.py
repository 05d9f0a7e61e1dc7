"""The tables of ``dct train``, as headers and rows of text: printed on the terminal and put into the report."""

from dataclasses import dataclass
from statistics import mean, stdev

from dct_compile.cli.results import KINDS, RARE, BackendResult, Results


@dataclass(frozen=True)
class Table:
    """A titled table; ``note`` says what its numbers are."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""


def quality(results: Results) -> Table:
    """Test metrics, replicas and speed, one row per backend."""
    rows = []
    for result in results.backends:
        checks = sum(run.replica_checks for run in result.runs)
        rows.append(
            [
                result.backend,
                _spread(result.mean_and_spread("log_loss"), 4),
                _spread(result.mean_and_spread("auc"), 4),
                _spread(result.mean_and_spread("steps_per_second"), 1),
                f"identical ({checks} checks)",
            ]
        )
    rows += _differences(results)
    seeds, settings = results.settings["seeds"], results.settings
    note = (
        f"Mean and standard deviation over {seeds} seeds. " if seeds > 1 else "One seed: no spread. "
    ) + f"{settings['dp']} data-parallel x {settings['mp']} model-parallel ranks on {results.environment['cores']} cores, gloo."
    return Table("Quality and speed", ["backend", "test log-loss", "test AUC", "steps/s", "replicas"], rows, note)


def traffic(results: Results) -> Table | None:
    """Bytes per step, dense and with DCT; ``None`` where DCT was not run, since only its backend counts them."""
    dct = results.get("dct")
    if dct is None or not any(dct.sites):
        return None
    rows = [_bytes_row(f"{name}s", dct, kinds) for name, kinds in KINDS.items() if name not in RARE or dct.bytes_of("dense_bytes", kinds)]
    rows.append(_bytes_row("all", dct, [kind for kinds in KINDS.values() for kind in kinds]))
    note = "Sent per rank and training step, mean over ranks, indices and other metadata included, forward and backward."
    return Table("Bytes on the wire", ["traffic", "dense", "dct", "ratio"], rows, note)


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
    """DCT less dense, seed by seed: both train on the same split, so the spread of the splits drops out."""
    dense, dct = results.get("dense"), results.get("dct")
    if dense is None or dct is None:
        return []
    cells = []
    for field in ("log_loss", "auc"):
        values = [getattr(b, field) - getattr(a, field) for a, b in zip(dense.runs, dct.runs, strict=True)]
        cells.append(_spread((mean(values), stdev(values) if len(values) > 1 else None), 4, sign="+"))
    return [["dct - dense", *cells, "", ""]]


def _bytes_row(name: str, result: BackendResult, kinds: list[str] | tuple[str, ...]) -> list[str]:
    dense, wire = result.bytes_of("dense_bytes", kinds), result.bytes_of("wire_bytes", kinds)
    return [name, f"{dense:,.0f}", f"{wire:,.0f}", f"{dense / wire:.1f}x" if wire else "-"]


def _spread(value: tuple[float, float | None], digits: int, sign: str = "") -> str:
    average, deviation = value
    return f"{average:{sign}.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")
