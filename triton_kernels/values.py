"""Values that the operators take as one argument: frozen dataclasses that a graph holds as constants."""

from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Self, TypeVar

if find_spec("torch._custom_class_base") is None:
    from torch._opaque_base import OpaqueBase
else:  # from torch 2.14 on a value needs no base class
    OpaqueBase = object  # type: ignore[assignment, misc]

_T = TypeVar("_T")

PerSegment = float | tuple[float, ...]
"""A number of all segments of a bucket, or one for each where they differ: the printed form stays short where they do not."""


def per_segment(numbers: Sequence[float]) -> PerSegment:
    """Returns ``numbers``, one for each segment, as `PerSegment`."""
    return numbers[0] if len(set(numbers)) == 1 else tuple(numbers)


def of_segment(number: PerSegment, segment: int) -> float:
    """Returns the number of one segment."""
    return number[segment] if isinstance(number, tuple) else number


@lru_cache(maxsize=4096)
def _make(cls: type[_T], **arguments: Any) -> _T:
    return cls(**arguments)


class Value(OpaqueBase):
    """Base of a frozen dataclass that is one argument of an operator.

    Its fields alone are printed and pickled: what it has computed from them differs between processes, and would spoil the keys of
    Inductor's cache.
    """

    @classmethod
    def of(cls, **arguments: Any) -> Self:
        """Returns the value with these fields, the same object in every call: what it has computed is kept."""
        made: Self = _make(cls, **arguments)
        return made

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        """Returns the expression by which generated code makes an equal value, and the class that it names."""
        name = type(self).__name__
        return f"{name}.of({', '.join(f'{key}={value!r}' for key, value in self._arguments().items())})", {name: type(self)}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(self._arguments().values())

    def _arguments(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
