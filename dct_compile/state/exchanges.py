"""Counts how often the gradients of parameters were exchanged: the phases of a training follow each other by these numbers.

They are numbers of the host, and equal on all ranks. The counters of a state are not: a step with NaN leaves those of some ranks unchanged.
Every exchange counts, also one whose gradient is discarded later, and each one of several that accumulate.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

from dct_compile.posts import Signature
from dct_compile.state.entry import NUMBER, Entry
from dct_compile.state.gradient_use import Use

PAST_ALL = 2**63 - 1
"""The number of a parameter whose state was saved without one: no training with phases has saved it, so it is past all of them."""


def exchanges_of(uses: Iterable[Use]) -> int:
    """Returns how often the gradients of all these parameters were exchanged: the smallest number of one."""
    return min((use.exchanges or 0 for use in uses), default=0)


def count_exchange(uses: Iterable[Use]) -> None:
    """Counts an exchange of the gradients of these parameters, before it begins. Until it does, it counts as dense for optimizers."""
    for use in uses:
        use.late = use.waits = False
        use.exchanges = min((use.exchanges or 0) + 1, PAST_ALL)


def signatures_of(named: Sequence[tuple[str, Use]]) -> list[Signature]:
    """Returns the numbers as the ranks compare them: one signature for parameters that follow each other and have the same one."""
    groups = [(number, [name for name, _ in items]) for number, items in groupby(named, lambda item: item[1].exchanges or 0)]
    return [Signature(f"exchanges of {len(names)} parameters so far", str(number), names[0]) for number, names in groups]


def with_number(entries: Sequence[Entry], use: Use | None) -> list[Entry]:
    """Returns the saved states of a parameter with the number in the first one, made for it where there is none."""
    if use is None or use.exchanges in (None, PAST_ALL):
        return list(entries)
    first, *others = entries or [{}]
    return [{**first, NUMBER: use.exchanges}, *others]


def restore_number(use: Use, entries: Sequence[Entry], default: int | None) -> list[Entry]:
    """Takes the number out of the saved states of a parameter; returns the states that hold more. ``default``: the number without one."""
    use.exchanges, use.agreed = next((entry[NUMBER] for entry in entries if NUMBER in entry), default), False
    rest = [{key: value for key, value in entry.items() if key != NUMBER} for entry in entries]
    return [entry for entry in rest if entry]


def default_number(states: Iterable[Sequence[Entry]]) -> int | None:
    """Returns the number of a parameter whose saved state has none, from the states of all parameters of its model."""
    entries = [entry for own in states for entry in own]
    return None if not entries or any(NUMBER in entry for entry in entries) else PAST_ALL
