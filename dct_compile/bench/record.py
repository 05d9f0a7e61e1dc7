"""The results of a study in a CSV file, so that it can be interrupted: a run that is there is not made again."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

Run = tuple[str | int | float, ...]
"""The values of the columns that name a run, in order."""


class Record:
    """The results of runs in a CSV file.

    A row has the columns ``run``, which name its run, and then the numbers ``measured``. A run has one row, or several in order.
    """

    def __init__(self, path: Path, run: Sequence[str], measured: Sequence[str]) -> None:
        self.path = path
        if not path.exists():
            self._append([[*run, *measured]])

    def rows(self, run: Run) -> list[list[float]]:
        """Returns the numbers of each row of ``run`` that is in the file now; none if it has not been made."""
        with self.path.open(newline="") as file:
            _, *rows = csv.reader(file)
        return [[float(number) for number in row[len(run) :]] for row in rows if _is_of(row, run)]

    def add(self, run: Run, rows: Iterable[Sequence[float]]) -> None:
        """Writes the rows of ``run``, and prints the last one."""
        new = [[*map(str, run), *(f"{number:.7g}" for number in row)] for row in rows]
        self._append(new)
        print(*new[-1], flush=True)

    def _append(self, rows: list[list[str]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)


def _is_of(row: Sequence[str], run: Run) -> bool:
    return all(type(value)(text) == value for value, text in zip(run, row, strict=False))
