"""Reads options of the backend from the command line."""

import ast
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import click

from dct_compile.options import default_options, split_options


class FiniteRange(click.FloatRange):
    """A range of numbers without ``nan`` and ``inf``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def parse_value(text: str) -> Any:
    """Returns an option's value as JSON or Python would read it (``true``, ``0.1``, ``["*.bias"]``, ``None``), else the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a dict; ``ValueError`` for a text without ``=`` and for a key given twice."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"{pair!r} is not of the form key=value")
        if key.strip() in options:
            raise ValueError(f"{key.strip()!r} is given twice")
        options[key.strip()] = parse_value(text)
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for an option that neither the backend nor Inductor knows, or whose value is not allowed."""
    known: list[str] = []
    if options.keys() - default_options().keys():
        # Late: a wrong value of an option of this project is told without torch, which knows those of Inductor.
        from torch._inductor import list_options

        known = list_options()
    split_options(options, known)
