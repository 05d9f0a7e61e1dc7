"""A link between the ranks of a group, as plain numbers: the time that a message takes, and the bytes per second."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

ETHERNET_LATENCY_S = 50e-6
"""The latency of a link that was given by its rate alone: one switch between two hosts."""
CPU_COPY_BYTES_PER_S = 8e9
GPU_COPY_BYTES_PER_S = 1e12
"""Bytes of memory that the kernels read and write per second, where it was not measured: one core of a CPU, and a GPU."""
CPU_INSIDE_BYTES_PER_S = 1e9
GPU_INSIDE_BYTES_PER_S = 5e10
"""Bytes that a rank sends to others of its host per second, where it was not measured: gloo over loopback, and NCCL between GPUs."""
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)bit(?:/s|ps)?\s*", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
ALLOWED = (
    "'auto', None, a rate such as '1Gbit/s' or '100Mbit/s', or a mapping with bytes_per_s and, if known, latency_s, copy_bytes_per_s and"
    " inside_bytes_per_s, all of them numbers > 0"
)


@dataclass(frozen=True)
class Link:
    """The link of one rank to the others.

    ``latency_s``: seconds that one hop takes, however short the message is. ``bytes_per_s``: bytes per second that a rank puts on the wire.
    ``copy_bytes_per_s``: bytes of memory per second that its kernels read and write. ``inside_bytes_per_s``: bytes per second that the rank
    sends to the other ranks of its host. Both are ``None`` for the usual number of the device.
    """

    bytes_per_s: float
    latency_s: float = ETHERNET_LATENCY_S
    copy_bytes_per_s: float | None = None
    inside_bytes_per_s: float | None = None

    def on(self, device_type: str) -> "Link":
        """Returns the link with rates of memory and inside of a host: its own, else the usual ones of "cpu" or "cuda"."""
        cpu = device_type == "cpu"
        copy = self.copy_bytes_per_s or (CPU_COPY_BYTES_PER_S if cpu else GPU_COPY_BYTES_PER_S)
        inside = self.inside_bytes_per_s or (CPU_INSIDE_BYTES_PER_S if cpu else GPU_INSIDE_BYTES_PER_S)
        return replace(self, copy_bytes_per_s=copy, inside_bytes_per_s=inside)

    def seconds(self, hops: int, wire_bytes: float, memory_bytes: float, inside_bytes: float = 0.0) -> float:
        """Returns the seconds that a rank needs for messages of ``hops`` one after the other.

        ``memory_bytes``: its passes over memory. ``inside_bytes``: what it sends to other ranks of its host.
        """
        wire_s = hops * self.latency_s + wire_bytes / self.bytes_per_s
        memory_s = memory_bytes / (self.copy_bytes_per_s or CPU_COPY_BYTES_PER_S)
        return wire_s + memory_s + inside_bytes / (self.inside_bytes_per_s or CPU_INSIDE_BYTES_PER_S)

    def resembles(self, other: "Link", factor: float = 2.0) -> bool:
        """Returns True if latency, rate, and rate inside of a host differ by no more than ``factor``, and are known of the same."""
        if (self.inside_bytes_per_s is None) != (other.inside_bytes_per_s is None):
            return False
        inside = (self.inside_bytes_per_s or 1.0, other.inside_bytes_per_s or 1.0)
        pairs = ((self.bytes_per_s, other.bytes_per_s), (self.latency_s, other.latency_s), inside)
        return all(max(pair) <= factor * min(pair) for pair in pairs)

    def numbers(self) -> dict[str, float]:
        """Returns the numbers that are known, by name: a mapping that :func:`parse` takes."""
        return {name: number for name, number in asdict(self).items() if number is not None}

    def __str__(self) -> str:
        """Returns the link in the units of the field, as "1 Gbit/s, 50 us"."""
        return f"{rate(self.bytes_per_s)}, {duration(self.latency_s)}"


ONE_MACHINE = Link(float("inf"), 0.0)
"""The link of ranks on one machine: what is sent passes through memory, as the work of a scheme does."""


def parse(value: Any) -> Link | None:
    """Returns the link that a text or a mapping names, ``None`` for what names none.

    Args:
        value: A rate as text, "1Gbit/s"; a mapping with the fields of :class:`Link`; or a link.
    """
    if isinstance(value, Link):
        return value
    if isinstance(value, str):
        found = _RATE.fullmatch(value)
        amount = float(found[1]) * _UNITS[found[2].lower()] / 8 if found else 0.0
        return Link(amount) if amount > 0 else None
    if not isinstance(value, Mapping) or "bytes_per_s" not in value or not value.keys() <= set(Link.__dataclass_fields__):
        return None
    given = {name: number for name, number in value.items() if number is not None}
    numbers = {name: float(number) for name, number in given.items() if isinstance(number, Real) and not isinstance(number, bool)}
    if len(numbers) < len(given) or not all(0 < number < float("inf") for number in numbers.values()):
        return None
    return Link(**numbers)


def rate(bytes_per_s: float) -> str:
    """Returns a rate in bits per second: "1 Gbit/s"."""
    bits = bytes_per_s * 8
    unit = next((unit for unit in "TGMk" if bits >= _UNITS[unit.lower()]), "")
    return f"{bits / _UNITS[unit.lower()]:.3g} {unit}bit/s"


def duration(seconds: float) -> str:
    """Returns a duration: "50 us", "1.3 ms", "2 s"."""
    scale, unit = next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "us"))
    return f"{seconds / scale:.3g} {unit}"
