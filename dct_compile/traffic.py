"""Counts what an exchange sends: messages, bytes on the wire, and bytes of memory that are passed over."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Traffic:
    """Work of one rank for one call of an exchange.

    ``messages``: collectives started, one after the other. ``wire``: bytes that the rank puts on the wire, exact. ``memory_bytes``: bytes
    that its kernels read and write. ``wire`` is exact so that a comparison of two offers never depends on the number of rows.
    """

    messages: int
    wire: Fraction
    memory_bytes: int = 0

    @property
    def wire_bytes(self) -> int:
        """Whole bytes on the wire."""
        return int(self.wire)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.messages + other.messages, self.wire + other.wire, self.memory_bytes + other.memory_bytes)


def ring_twice(input_bytes: int, ranks: int) -> Fraction:
    """Returns the wire bytes of an all_reduce: a ring passes every share around twice, which is the fewest bytes possible."""
    return Fraction(2 * (ranks - 1) * input_bytes, ranks)


def to_all(input_bytes: int, ranks: int) -> Fraction:
    """Returns the wire bytes of an all_gather: the whole input goes to every other rank."""
    return Fraction((ranks - 1) * input_bytes)


def one_share_to_each(input_bytes: int, ranks: int) -> Fraction:
    """Returns the wire bytes of an even all_to_all, or of a reduce_scatter as a ring."""
    return Fraction((ranks - 1) * input_bytes, ranks)


def from_one(input_bytes: int, ranks: int) -> Fraction:
    """Returns the wire bytes of a broadcast, mean over the ranks: the input reaches all but one, whoever passes it on."""
    return Fraction((ranks - 1) * input_bytes, ranks)


def once(input_bytes: int, ranks: int) -> Fraction:
    """Returns the wire bytes of every collective that is not known: the input, once."""
    return Fraction(input_bytes if ranks > 1 else 0)


def share_leaving(splits: Sequence[int], own: int) -> Fraction:
    """Returns the fraction of an uneven all_to_all's rows that leaves rank ``own``."""
    total = sum(splits)
    return Fraction(total - splits[own], total) if total else Fraction(0)
