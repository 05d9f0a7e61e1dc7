"""Progress of a long command: a bar on a terminal, and a line from time to time where the output goes to a file or a pipe."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import click

EVERY_S = 10.0
"""Seconds between two lines."""
NOTHING: Mapping[str, str] = {}


class Progress:
    """Shows how many of ``total`` steps are done. Used as a context.

    Args:
        total: The number of steps.
        title: Stands before the numbers.
        shown: Whether this process shows anything: one rank of several does.
    """

    def __init__(self, total: int, title: str, *, shown: bool = True) -> None:
        self.total, self.title, self.done, self.note = total, title, 0, ""
        self._start, self._next, self._bar = time.monotonic(), float("inf"), None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm  # late: it may be missing where there is no terminal

            self._bar = tqdm(total=total, desc=title, mininterval=0.5)
        elif shown:
            self._next = self._start
        self._say()

    def step(self, numbers: Mapping[str, str] = NOTHING) -> None:
        """Counts one step. ``numbers``: by name, of this step."""
        self.done, self.note = self.done + 1, "".join(f", {name} {number}" for name, number in numbers.items())
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            self._bar.update()
        self._say()

    def retitle(self, title: str) -> None:
        """Sets the title for what comes next."""
        self.title = title
        if self._bar is not None:
            self._bar.set_description(title)

    def _say(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_S
            click.echo(f"{self.title}: {self.done} of {self.total}, {now - self._start:.0f} s{self.note}", err=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
