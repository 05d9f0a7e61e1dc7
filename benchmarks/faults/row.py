"""A row of the table: a fault that is provoked, and a check of what came of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class UnexpectedError(AssertionError):
    """What came of a fault is not what was expected."""


@dataclass(frozen=True)
class Row:
    """A fault.

    ``fault``: its name. ``how``: how it is provoked. ``expected``: the outcome that ``run`` checks. ``ranks``: how many take part.
    ``run``: provokes it with an empty folder of its own, and returns what came of it. It raises UnexpectedError where that differs.
    """

    fault: str
    how: str
    expected: str
    ranks: int
    run: Callable[[Path], str]


def check(condition: bool, got: object) -> None:
    """Raises UnexpectedError with ``got`` unless ``condition`` holds."""
    if not condition:
        raise UnexpectedError(str(got))
