"""The options that ``dct tune`` tries: for each its values, or a range of which it takes the logarithm."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dct_compile.cli.parsing import parse_value
from dct_compile.config import DCTConfig
from dct_compile.options import default_options

_RANGE = re.compile(r"(.+)\.\.(.+)")


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both above 0; as likely in each equal part of their logarithms."""

    low: float
    high: float

    def holds(self, value: Any) -> bool:
        """Returns whether ``value`` is in the range."""
        return isinstance(value, float) and self.low <= value <= self.high

    def ends(self) -> tuple[Any, ...]:
        """Returns values of which each must be allowed, if all are."""
        return self.low, self.high


@dataclass(frozen=True)
class Choice:
    """One of ``values``."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Returns whether ``value`` is one of the values."""
        return value in self.values

    def ends(self) -> tuple[Any, ...]:
        """Returns values of which each must be allowed, if all are."""
        return self.values


Space = dict[str, Range | Choice]
_BY_KIND: Mapping[str, Space] = {
    "gradient": {"dp_density": Range(0.001, 0.25), "dp_value_dtype": Choice(("bfloat16", "int8"))},
    "activation": {"activation_codec": Choice(("auto", "int8", "int4", "bfloat16", "dense"))},
    "embedding": {"embedding_codec": Choice(("int8", "int4", "dense"))},
    "parameter": {"parameter_codec": Choice(("int8", "int4", "bfloat16", "dense"))},
    "sharded_gradient": {"sharded_gradients": Choice(("int8", "dense"))},
}


def space_for(kinds: Iterable[str], fixed: Mapping[str, Any]) -> Space:
    """Returns what there is to choose for collectives of these kinds, less the options that are ``fixed``."""
    return {name: values for kind in kinds for name, values in _BY_KIND.get(kind, {}).items() if name not in fixed}


def parse_space(texts: Sequence[str], fixed: Mapping[str, Any]) -> Space:
    """Returns the space that ``--search`` names.

    Args:
        texts: Each is ``option=low..high`` or ``option=value,value,...``.
        fixed: The options that all trainings have.

    Raises:
        ValueError: A text has another form, or a value is not allowed for its option.
    """
    space: Space = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not separator or not values:
            raise ValueError(f"--search {text!r} is not of the form option=low..high or option=value,value")
        if name in space or name in fixed:
            raise ValueError(f"option {name!r} is given twice")
        if name not in default_options():
            raise ValueError(f"--search {text!r}: there is no option {name!r}; allowed are {', '.join(default_options())}")
        found = _RANGE.fullmatch(values)
        space[name] = _range(text, *found.groups()) if found else Choice(tuple(parse_value(value) for value in values.split(",")))
        for value in space[name].ends():
            DCTConfig(**{**fixed, name: value})
    return space


def _range(text: str, low: str, high: str) -> Range:
    ends = parse_value(low), parse_value(high)
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or not 0 < ends[0] < ends[1]:
        raise ValueError(f"--search {text!r}: a range needs two numbers above 0, the lower one first")
    return Range(float(ends[0]), float(ends[1]))


def defaults(space: Space) -> dict[str, Any]:
    """Returns the defaults of the options of ``space``, as far as it holds them."""
    return {name: value for name, value in default_options().items() if name in space and space[name].holds(value)}
