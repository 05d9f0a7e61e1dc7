"""Provokes faults with real processes, checks what comes of them, and writes the table of ``docs/reliability.md``.

A row takes seconds to minutes. Results are kept in a file, one line for each fault; a later run of some rows replaces theirs.

    python benchmarks/reliability.py [--only "kill;soak"] [--soak-steps 100000]
"""

import csv
import datetime
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import torch
from faults import differing, endurance, machine, peers, states, values
from faults.row import Row, UnexpectedError

from dct_compile.bench.machine import processor_name

SOAK_STEPS = 25_000
"""Steps of the soak, which take about three minutes."""
LEAST_STEPS = 3_000
"""Enough for several looks in each way."""


def rows(soak_steps: int) -> tuple[Row, ...]:
    """Returns all faults, with a soak of ``soak_steps``."""
    others = (*peers.ROWS, *differing.ROWS, *values.ROWS, *states.ROWS, *machine.ROWS, *endurance.ROWS)
    return *others, endurance.soak_row(soak_steps)


ROWS = rows(SOAK_STEPS)
RESULTS = Path(__file__).parent / "results" / "reliability.csv"
PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
SHOWN = ("fault", "how provoked", "expected", "got", "ranks")
CIRCUMSTANCES = ("machine", "versions", "date")
COLUMNS = (*SHOWN, *CIRCUMSTANCES, "seconds")
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
    seconds = time.monotonic() - start
    processor = f"{processor_name()}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    shown = (row.fault, row.how, row.expected, got, str(row.ranks))
    return dict(zip(COLUMNS, (*shown, processor, versions, datetime.date.today().isoformat(), f"{seconds:.0f}"), strict=True))


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
    """Returns what is written to the page: where and when how many rows were run, and the table."""
    found = [lines[row.fault] for row in ROWS if row.fault in lines]
    runs = Counter(", ".join(line[name] for name in CIRCUMSTANCES) for line in found)
    cells = [SHOWN, ("---",) * len(SHOWN), *[[line[name] for name in SHOWN] for line in found]]
    where = [f"{count} {'row' if count == 1 else 'rows'}: {run}.\n" for run, count in runs.items()]
    return "\n".join([*where, *[f"| {' | '.join(texts)} |" for texts in cells]])


@click.command()
@click.option("--only", default="", help="Rows whose fault contains one of these words, separated by semicolons.")
@click.option("--soak-steps", type=click.IntRange(LEAST_STEPS), default=SOAK_STEPS, show_default=True, help="Steps of the soak.")
@click.option("--list", "listed", is_flag=True, help="Prints the faults, and provokes none.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="The file of results.")
@click.option("--page", type=click.Path(path_type=Path), default=PAGE, help="The page whose table is written.")
def main(only: str, soak_steps: int, listed: bool, results: Path, page: Path) -> None:
    """Exits with 1 if a fault had another outcome than expected."""
    words = [word.strip() for word in only.split(";")]
    chosen = [row for row in rows(soak_steps) if any(word in row.fault for word in words)]
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
