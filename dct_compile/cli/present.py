"""Shows the results of ``dct train``: tables on the terminal, plots, and one self-contained HTML page."""

import base64
from pathlib import Path

import click
from jinja2 import Environment, PackageLoader, StrictUndefined
from tabulate import tabulate

from dct_compile.cli.captions import alternatives, verdict
from dct_compile.cli.plots import draw
from dct_compile.cli.results import Results
from dct_compile.cli.tables import Table, link, quality, sent, sites, traffic

_SHORT = 40


def present(folder: Path) -> None:
    """Reads ``folder``/metrics.json, prints its tables and writes the plots and report.html beside it."""
    results = Results.read(folder)
    tables = [table for table in (quality(results), sent(results), traffic(results), link(results), sites(results)) if table is not None]
    sentence = verdict(results)
    click.echo(f"\n{sentence}")
    for table in tables:
        click.echo(f"\n{table.title}\n{as_text(table)}")
    dct = results.get("dct")
    notes = dct.notes if dct is not None else []
    for note in notes:
        click.echo(f"note: {note}")
    light, dark = draw(results, dark=False), draw(results, dark=True)
    for name, image in light.items():
        (folder / f"{name}.png").write_bytes(image)
    texts = alternatives(results)
    plots = [(texts[name], _inline(image), _inline(dark[name])) for name, image in light.items()]
    environment = Environment(loader=PackageLoader("dct_compile.cli", "."), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.j2")
    page = template.render(results=results, verdict=sentence, tables=tables, plots=plots, notes=notes)
    (folder / "report.html").write_text(page, encoding="utf-8")
    click.echo(f"\nReport: {(folder / 'report.html').resolve()}")


def as_text(table: Table) -> str:
    """Returns the table for a terminal: long cells are shortened, numbers are as they are."""
    rows = [[cell if len(cell) <= _SHORT else cell[: _SHORT - 1] + "…" for cell in row] for row in table.rows]
    left = ("link", "backend", "traffic", "collective", "kind", "name", "decision", "reason", "replicas", "known by")
    align = ["left" if header in left else "right" for header in table.headers]
    text = tabulate(rows, table.headers, disable_numparse=True, colalign=align)
    return f"{text}\n{table.note}" if table.note else text


def _inline(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
