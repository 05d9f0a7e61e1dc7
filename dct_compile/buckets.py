"""Sizes of the buckets in which gradients are averaged. What is sent beside the backward costs no time, what is left at its end does.

::

    one bucket       backward backward backward | pack  wire wire wire wire
    four buckets     backward backward backward | pack  wire
                         wire     wire    wire
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dct_compile.link import ONE_MACHINE, Link
from dct_compile.traffic import NOTHING, Traffic

BUCKET_BYTES = 25 * 2**20
"""As DDP's default bucket: large enough for the bandwidth of a usual link, small enough to start early."""
BUCKET_S = 2e-3
"""Seconds that one more bucket costs beside its message on a CPU, about: kernels, a hook, and a cut in the graph under DDP."""
_LARGEST_BUCKET = 2**30


def bucket_bytes_on(link: Link | None, ranks: int, density: float, gradient_bytes: int) -> int:
    """Returns the bytes of a bucket for a link.

    They are :data:`BUCKET_BYTES`, more where the message of a bucket would end before its latency is over, and less where the backward
    would end long before the wire is done.

    Args:
        link: The link of the group, ``None`` where it is not known.
        ranks: The ranks of the group.
        density: The fraction of a bucket that is sent.
        gradient_bytes: Bytes of all gradients.
    """
    if link is None or link == ONE_MACHINE:
        return BUCKET_BYTES
    hops = ranks - 1
    enough = link.latency_s * hops * link.bytes_per_s / density
    # "gather" sends a payload to each other rank, "owner" about two payloads in all.
    wire_bytes = gradient_bytes * density * min(hops, 2)
    return min(max(BUCKET_BYTES, round(enough)), _LARGEST_BUCKET, best_bytes(link, gradient_bytes, wire_bytes, hops))


def best_bytes(link: Link, gradient_bytes: int, wire_bytes: float, hops: int) -> int:
    """Returns the bytes of a bucket with which the gradients add the fewest seconds to a step.

    With k equal buckets a step waits for the last one and pays for each: ``wire / k + k * cost``. That is least at ``sqrt(wire / cost)``.

    Args:
        link: The link of the group.
        gradient_bytes: Bytes of all gradients.
        wire_bytes: Bytes that a rank sends for them.
        hops: Messages of a bucket, one after the other.
    """
    count = math.sqrt(wire_bytes / link.bytes_per_s / _cost_s(link, hops))
    return math.ceil(gradient_bytes / max(1.0, count))


@dataclass(frozen=True)
class SmallerBuckets:
    """Buckets of ``mib`` MiB (DDP's ``bucket_cap_mb``) would save up to ``saved_s`` seconds of a step."""

    mib: int
    saved_s: float


def smaller_buckets(link: Link | None, buckets: Sequence[Sequence[int]], traffics: Sequence[Traffic]) -> SmallerBuckets | None:
    """Returns the buckets that would save time, ``None`` where the saving is less than what a bucket costs, or the link is not known.

    Args:
        link: The link of the group.
        buckets: Bytes of each parameter, by bucket, in the order in which their gradients are ready.
        traffics: What a rank sends for each bucket.
    """
    sizes = [size for bucket in buckets for size in bucket]
    if link is None or link == ONE_MACHINE or not sizes:
        return None
    wire_bytes, hops = float(sum(traffics, NOTHING).wire), max(traffic.hops for traffic in traffics)
    mib = max(1, round(best_bytes(link, sum(sizes), wire_bytes, hops) / 2**20))

    def added_s(held: Sequence[int]) -> float:
        return wire_bytes * held[-1] / sum(sizes) / link.bytes_per_s + len(held) * _cost_s(link, hops)

    saved_s = added_s([sum(bucket) for bucket in buckets]) - added_s(list(_filled(sizes, mib * 2**20)))
    return SmallerBuckets(mib, saved_s) if saved_s > BUCKET_S else None


def _cost_s(link: Link, hops: int) -> float:
    return BUCKET_S + hops * link.latency_s


def _filled(sizes: Iterable[int], limit: int) -> Iterable[int]:
    """Yields the bytes of each bucket as DDP fills them: one is full when it has reached ``limit``."""
    held = 0
    for size in sizes:
        held += size
        if held >= limit:
            yield held
            held = 0
    if held:
        yield held
