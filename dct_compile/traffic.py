"""Counts what an exchange costs: messages, hops, bytes on the wire, bytes of memory that are passed over, and a start."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from dct_compile.link import Link


@dataclass(frozen=True)
class Traffic:
    """Work of one rank for one call of an exchange.

    ``messages``: collectives started, one after the other. ``wire``: bytes that the rank puts on the wire, exact. ``hops``: messages from
    rank to rank of which each waits for the one before. ``memory_bytes``: bytes that its kernels read and write. ``inside_bytes``: bytes
    that the rank sends to other ranks of its host, which are not on the wire. ``start_s``: seconds that it takes however few all of these
    are. ``wire`` is exact so that a comparison of two offers never depends on the number of rows.
    """

    messages: int
    wire: Fraction
    hops: int
    memory_bytes: int = 0
    inside_bytes: int = 0
    start_s: float = 0.0

    @property
    def wire_bytes(self) -> int:
        """Whole bytes on the wire."""
        return int(self.wire)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.messages + other.messages,
            self.wire + other.wire,
            self.hops + other.hops,
            self.memory_bytes + other.memory_bytes,
            self.inside_bytes + other.inside_bytes,
            self.start_s + other.start_s,
        )

    def passing_over(self, memory_bytes: int) -> "Traffic":
        """Returns this traffic, with kernels that read and write ``memory_bytes`` more."""
        return replace(self, memory_bytes=self.memory_bytes + memory_bytes)

    def inside_a_host(self, sent_bytes: int) -> "Traffic":
        """Returns this traffic, with ``sent_bytes`` more that the rank sends to other ranks of its host."""
        return replace(self, inside_bytes=self.inside_bytes + sent_bytes)

    def starting(self, start_s: float) -> "Traffic":
        """Returns this traffic, with ``start_s`` seconds more that do not grow with it."""
        return replace(self, start_s=self.start_s + start_s)

    def riding(self) -> "Traffic":
        """Returns the traffic of the same bytes in messages that are counted elsewhere."""
        return replace(self, messages=0, hops=0)

    def seconds(self, link: Link) -> float:
        """Returns the seconds that it takes on ``link``, where nothing else runs."""
        return self.start_s + link.seconds(self.hops, float(self.wire), self.memory_bytes, self.inside_bytes)


NOTHING = Traffic(0, Fraction(0), 0)


def ring_twice(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of an all_reduce: a ring passes every share around twice, which is the fewest bytes possible."""
    return Traffic(1, Fraction(2 * (ranks - 1) * input_bytes, ranks), 2 * (ranks - 1))


def to_all(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of an all_gather: the whole input goes to every other rank, around a ring."""
    return Traffic(1, Fraction((ranks - 1) * input_bytes), ranks - 1)


def one_share_to_each(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of an even all_to_all, whose messages start at once."""
    return Traffic(1, Fraction((ranks - 1) * input_bytes, ranks), min(1, ranks - 1))


def ring_once(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of a reduce_scatter: a ring passes every share around once."""
    return Traffic(1, Fraction((ranks - 1) * input_bytes, ranks), ranks - 1)


def from_one(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of a broadcast, mean over the ranks: the input reaches all but one, whoever passes it on."""
    return Traffic(1, Fraction((ranks - 1) * input_bytes, ranks), (ranks - 1).bit_length())


def received(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of a rank that only receives."""
    return NOTHING


def once(input_bytes: int, ranks: int) -> Traffic:
    """Returns the traffic of every collective that is not known: the input, once."""
    return Traffic(1, Fraction(input_bytes if ranks > 1 else 0), min(1, ranks - 1))


def share_leaving(splits: Sequence[int], own: int) -> Fraction:
    """Returns the fraction of an uneven all_to_all's rows that leaves rank ``own``."""
    total = sum(splits)
    return Fraction(total - splits[own], total) if total else Fraction(0)
