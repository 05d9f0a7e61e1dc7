"""Provokes faults with real processes, checks what comes of them, and writes the table of ``docs/reliability.md``.

A row takes seconds to a minute. Results are kept in a file, one line for each fault; a later run of some rows replaces theirs.

    python benchmarks/reliability.py [--only "kill;soak"]
"""

import csv
import datetime
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from faults import differing, endurance, machine, peers, states, values
from faults.row import Row, UnexpectedError

ROWS: tuple[Row, ...] = (*peers.ROWS, *differing.ROWS, *values.ROWS, *states.ROWS, *machine.ROWS, *endurance.ROWS)
RESULTS = Path(__file__).parent / "results" / "reliability.csv"
PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
COLUMNS = ("fault", "how provoked", "expected", "got", "ranks", "versions", "date", "seconds")
SHOWN = COLUMNS[:6]
FAILED = "NOT AS EXPECTED: "
_TABLE = re.compile(r"(?<=<!-- made by benchmarks/reliability.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def provoke(row: Row) -> dict[str, str]:
    """Runs a row. Returns its line of the results; one that differs says so in ``got``."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            got = row.run(Path(folder))
        except (UnexpectedError, RuntimeError) as error:
            got = f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    shown = (row.fault, row.how, row.expected, got, str(row.ranks), versions)
    return dict(zip(COLUMNS, (*shown, datetime.date.today().isoformat(), f"{time.monotonic() - start:.0f}"), strict=True))


def read(path: Path) -> dict[str, dict[str, str]]:
    """Returns the lines of the results by fault."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {line["fault"]: line for line in csv.DictReader(file)}


def write(path: Path, lines: dict[str, dict[str, str]]) -> None:
    """Writes the lines of faults that there are, in their order."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[row.fault] for row in ROWS if row.fault in lines)


def table(lines: dict[str, dict[str, str]]) -> str:
    """Returns the table of the page."""
    rows = [SHOWN, ("---",) * len(SHOWN), *[[lines[row.fault][name] for name in SHOWN] for row in ROWS if row.fault in lines]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


@click.command()
@click.option("--only", default="", help="Rows whose fault contains one of these words, separated by semicolons.")
@click.option("--list", "listed", is_flag=True, help="Prints the faults, and provokes none.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.")
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, help="The page whose table is written.")
def main(only: str, listed: bool, results: Path, page: Path) -> None:
    """Exits with 1 if a fault had another outcome than expected."""
    words = [word.strip() for word in only.split(";")]
    chosen = [row for row in ROWS if any(word in row.fault for word in words)]
    if not chosen:
        raise click.BadParameter(f"no fault contains {only!r}; --list names them", param_hint="--only")
    if listed:
        print("\n".join(row.fault for row in chosen))
        return
    failed = 0
    for row in chosen:
        line = provoke(row)
        failed += line["got"].startswith(FAILED)
        print(f"{line['fault']} ({line['seconds']} s): {line['got']}", flush=True)
        write(results, {**read(results), row.fault: line})
        page.write_text(_TABLE.sub(lambda _: f"\n{table(read(results))}\n\n", page.read_text()))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
