"""Checks of the values of options: each returns what is kept of a value, or says which values are right."""

import difflib
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from dct_compile.link import ALLOWED, Link, parse
from dct_compile.warmup import Schedule, explicit

LARGEST_NUMBER = (2.0 - 2.0**-23) * 2.0**127
LARGEST_INTEGER = 2**63 - 1
"""The largest float32 and int64, which the operators take. Written out, so that options can be checked without torch."""
_WARMUPS = "an integer >= 0, or a mapping {first step: density} from step 0 on, whose densities in (0, 1] fall down to dp_density"


class OptionError(ValueError):
    """An option has a wrong value. ``allowed``: the values that are right, in words."""

    def __init__(self, message: str, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed

    def __reduce__(self) -> tuple[Any, ...]:
        return OptionError, (*self.args, self.allowed)


def error(name: str, value: object, allowed: str) -> OptionError:
    """Returns the error of an option ``name`` whose ``value`` is wrong. ``allowed``: the values that are right."""
    return OptionError(f"option {name!r} is {value!r} ({type(value).__name__}); allowed is {allowed}", allowed)


def number(name: str, value: object, low: float, allowed: str) -> float:
    """Returns a number from ``low`` on as a float."""
    if not low <= _float(value) <= LARGEST_NUMBER:
        raise error(name, value, f"{allowed}, up to {LARGEST_NUMBER}, float32's largest")
    return _float(value)


def fraction(name: str, value: object) -> float:
    """Returns a number in (0, 1] as a float."""
    if not 0.0 < _float(value) <= 1.0:
        raise error(name, value, "a number in (0, 1]: the fraction kept")
    return _float(value)


def integer(name: str, value: Any, low: int, others: str = "") -> int:
    """Returns an integer from ``low`` on. ``others``: what else is allowed."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) <= LARGEST_INTEGER:
        raise error(name, value, f"{others}an integer >= {low}, up to {LARGEST_INTEGER}")
    return int(value)


def check_bool(name: str, value: object) -> None:
    """Raises ``ValueError`` for what is neither True nor False."""
    if not isinstance(value, bool):
        raise error(name, value, "True or False")


def check_ranks(name: str, value: object) -> None:
    """Raises ``ValueError`` for what is neither True, False nor a process group."""
    distributed = sys.modules.get("torch.distributed")  # there is no group without it
    if not isinstance(value, bool) and (distributed is None or not isinstance(value, distributed.ProcessGroup)):
        raise error(name, value, "True, False or a torch.distributed.ProcessGroup")


def check_choice(name: str, value: object, choices: tuple[str, ...], more: str = "") -> None:
    """Raises ``ValueError`` for a value that is none of ``choices``. ``more``: what else is allowed."""
    if not isinstance(value, str) or value not in choices:
        near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise error(name, value, f"one of {', '.join(map(repr, choices))}{more}{hint}")


def patterns(name: str, value: Any) -> tuple[str, ...]:
    """Returns a list of patterns as a tuple."""
    if not isinstance(value, list | tuple | set) or not all(isinstance(pattern, str) for pattern in value):
        raise error(name, value, "a list of patterns (strings) of parameters, modules or source lines")
    # Any of them may match, and a set has another order in each process.
    return tuple(sorted(value) if isinstance(value, set) else value)


def densities(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """Returns a mapping of patterns to densities, or the pairs that were made of one, as pairs."""
    try:
        pairs = tuple((pattern, density) for pattern, density in (value.items() if isinstance(value, Mapping) else value))
    except (TypeError, ValueError):
        pairs = ((None, None),)
    if isinstance(value, str) or not all(isinstance(pattern, str) and 0 < _float(density) <= 1 for pattern, density in pairs):
        raise error(name, value, "a mapping of patterns (strings) of parameter names to numbers in (0, 1]")
    return tuple((pattern, _float(density)) for pattern, density in pairs)


def codecs(name: str, value: Any, choices: tuple[str, ...]) -> str | tuple[tuple[str, str], ...]:
    """Returns one of ``choices``, or a mapping of patterns to them as pairs."""
    if not isinstance(value, Mapping | tuple):
        check_choice(name, value, choices, ", or a mapping of patterns (strings) of modules or source lines to these")
        return value  # type: ignore[no-any-return]
    pairs = tuple(value.items() if isinstance(value, Mapping) else value)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str) or pair[1] not in choices:
            raise error(name, value, f"one of {', '.join(map(repr, choices))}, or a mapping of patterns (strings) to these")
    return pairs


def link(name: str, value: Any) -> "str | Link | None":
    """Returns "auto", ``None``, or the link that the value names."""
    if value is None or value == "auto":
        return value  # type: ignore[no-any-return]
    found = parse(value)
    if found is None:
        raise error(name, value, ALLOWED)
    return found


def warmup(name: str, value: Any, density: float) -> int | Schedule:
    """Returns a number of steps, or a schedule that falls down to ``density``."""
    kept = explicit(value, density)
    if kept is not None:
        return kept
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) <= LARGEST_INTEGER:
        raise error(name, value, _WARMUPS)
    return int(value)


def _float(value: Any) -> float:
    """Returns a number as a float, and NaN for what is none."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")
    except OverflowError:
        return float("inf")
