"""The sizes of gradient buckets on a link."""

import pytest

from dct_compile.buckets import BUCKET_BYTES, best_bytes, bucket_bytes_on, smaller_buckets
from dct_compile.link import ONE_MACHINE, Link
from dct_compile.traffic import to_all

MIB = 2**20
SLOW = Link(12.5e6)
TRAFFICS = [to_all(10_000, 2), to_all(240_000, 2)]


@pytest.mark.parametrize(
    ("link", "ranks", "gradient_bytes", "wanted"),
    [
        (None, 2, 2**32, BUCKET_BYTES),
        (ONE_MACHINE, 64, 2**32, BUCKET_BYTES),
        (Link(1.25e8), 4, 100 * MIB, BUCKET_BYTES),
        (Link(1.25e8, 0.01), 2, 2**30, 125_000_000),
        (Link(1.25e9, 1.0), 2, 2**31, 2**30),
        (SLOW, 2, MIB, MIB),
        # 1 % of it takes 21 ms, each of k buckets 2.05 ms: k is the root of their ratio, 3.2.
        (SLOW, 2, 25 * MIB, 8_196_000),
        # "gather" would send three payloads, "owner" two.
        (SLOW, 4, 25 * MIB, 5_930_000),
    ],
)
def test_buckets_of_a_link(link: Link | None, ranks: int, gradient_bytes: int, wanted: int) -> None:
    assert bucket_bytes_on(link, ranks, 0.01, gradient_bytes) == pytest.approx(wanted, rel=1e-3)


def test_the_best_size_adds_the_fewest_seconds() -> None:
    gradients, wire, hops = 27_000_000, 250_000.0, 1
    best = gradients / best_bytes(SLOW, gradients, wire, hops)

    def added_s(buckets: float) -> float:
        return wire / SLOW.bytes_per_s / buckets + buckets * (2e-3 + hops * SLOW.latency_s)

    assert best == pytest.approx(min((count / 100 for count in range(100, 1000)), key=added_s), abs=0.01)


def test_smaller_buckets_are_named_with_what_they_save() -> None:
    found = smaller_buckets(SLOW, [[MIB], [MIB] * 24], TRAFFICS)
    assert found is not None
    assert found.mib == 8
    # The last one has a MiB of 25 then, in place of 24; there are four in place of two.
    assert found.saved_s == pytest.approx(0.02 * 23 / 25 - 2 * 2.05e-3)


@pytest.mark.parametrize(
    ("link", "buckets"),
    [
        (None, [[25 * MIB]]),
        (ONE_MACHINE, [[25 * MIB]]),
        (SLOW, []),
        pytest.param(SLOW, [[25 * MIB]], id="one parameter is in one bucket"),
        pytest.param(SLOW, [[8 * MIB], [8 * MIB], [8 * MIB], [MIB]], id="small enough"),
        pytest.param(Link(1.25e8), [[MIB] * 25], id="a fast link"),
    ],
)
def test_nothing_is_named_where_nothing_is_saved(link: Link | None, buckets: list[list[int]]) -> None:
    assert smaller_buckets(link, buckets, TRAFFICS) is None
