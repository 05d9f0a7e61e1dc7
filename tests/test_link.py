"""The link model: what a link's text means, the seconds of an exchange, and the decisions that follow from them."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import dct_compile.links as links_module
from dct_compile.config import DCTConfig
from dct_compile.link import ETHERNET_LATENCY_S, GPU_COPY_BYTES_PER_S, GPU_INSIDE_BYTES_PER_S, ONE_MACHINE, Link, duration, parse, rate
from dct_compile.passes.decision import Decision
from dct_compile.passes.plan import decide, plan
from dct_compile.traffic import from_one, one_share_to_each, ring_once, ring_twice, to_all
from tests.hand_made_sites import make_gradient, make_site


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1Gbit/s", Link(1.25e8)),
        ("100 Mbit/s", Link(1.25e7)),
        ("2.5gbit", Link(3.125e8)),
        ("8bit/s", Link(1.0)),
        ({"bytes_per_s": 10}, Link(10.0)),
        ({"bytes_per_s": 10, "latency_s": 0.5, "copy_bytes_per_s": None}, Link(10.0, 0.5)),
        (Link(3.0), Link(3.0)),
        ("0Gbit/s", None),
        ("1GB/s", None),
        ({"latency_s": 1.0}, None),
        ({"bytes_per_s": True}, None),
    ],
)
def test_parse(given: Any, expected: Link | None) -> None:
    assert parse(given) == expected


def test_texts() -> None:
    assert [rate(size) for size in (1.25e8, 1.25e6, 12.5, 5e13)] == ["1 Gbit/s", "10 Mbit/s", "100 bit/s", "400 Tbit/s"]
    assert [duration(seconds) for seconds in (2.0, 0.0013, 5e-5)] == ["2 s", "1.3 ms", "50 us"]
    assert str(Link(1.25e8)) == "1 Gbit/s, 50 us"


def test_seconds_are_hops_and_bytes_and_memory() -> None:
    link = Link(1e6, latency_s=0.5, copy_bytes_per_s=1e3)
    assert link.seconds(hops=3, wire_bytes=2e6, memory_bytes=4e3) == 1.5 + 2.0 + 4.0
    assert ring_twice(100, 5).passing_over(2000).seconds(link) == pytest.approx(8 * 0.5 + 160e-6 + 2)
    assert Link(1.0).on("cuda").copy_bytes_per_s == GPU_COPY_BYTES_PER_S
    assert Link(1.0).on("cuda").inside_bytes_per_s == GPU_INSIDE_BYTES_PER_S
    known = replace(link, inside_bytes_per_s=2e3)
    assert known.on("cuda") == known
    assert ring_twice(100, 5).inside_a_host(5000).seconds(known) == pytest.approx(8 * 0.5 + 160e-6 + 2.5)
    started = ring_twice(100, 5).starting(0.25)
    assert (started + started).seconds(link) == pytest.approx(2 * (8 * 0.5 + 160e-6 + 0.25))


@pytest.mark.parametrize(
    ("traffic", "hops"),
    [(ring_twice(8, 4), 6), (to_all(8, 4), 3), (ring_once(8, 4), 3), (one_share_to_each(8, 4), 1), (from_one(8, 4), 2), (to_all(8, 1), 0)],
)
def test_hops(traffic: Any, hops: int) -> None:
    assert (traffic.hops, traffic.messages) == (hops, 1)


def test_resembles() -> None:
    assert Link(1.0, 1.0).resembles(Link(2.0, 0.5))
    assert not Link(1.0, 1.0).resembles(Link(2.1, 1.0))
    assert not Link(1.0, 1.0).resembles(Link(1.0, 0.4))
    assert Link(1.0, 1.0, 1.0, 3.0).resembles(Link(1.0, 1.0, 9.0, 6.0))
    assert not Link(1.0, 1.0, 1.0, 3.0).resembles(Link(1.0, 1.0, 1.0, 7.0))
    assert not Link(1.0, 1.0, 1.0, 3.0).resembles(Link(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("link", "scheme", "words"),
    [
        (None, "gather", "gather, density 0.01"),
        (Link(1.25e6), "gather", "gather, density 0.01"),
        (Link(1e12, 1e-6, 8e9), "dense", "gather would take 20.1 ms, dense takes 42 us on a link of 8 Tbit/s, 1 us"),
        (ONE_MACHINE, "dense", "all ranks are on one machine"),
    ],
)
def test_seconds_decide_about_a_gradient(link: Link | None, scheme: str, words: str) -> None:
    (decision,) = plan([make_gradient(10**7, ranks=2)], DCTConfig(), True, lambda _: link)
    assert decision.scheme == scheme
    assert decision.reason.startswith(words)
    if link is not None:
        assert decision.dense_seconds == link.seconds(2, 4e7, 0)
    assert (decision.seconds == decision.dense_seconds) == (scheme == "dense" or link is None)


@pytest.mark.parametrize(("start_s", "scheme"), [(0.0, "gather"), (1e-3, "gather"), (2e-3, "dense")])
def test_an_exchange_that_takes_about_as_long_to_start_as_dense_takes_is_left_dense(start_s: float, scheme: str) -> None:
    """80,000 bytes pass by in 0.64 ms at 1 Gbit/s, and there and back by four ranks in 0.96 ms; each of six hops takes 0.2 ms."""
    (plain,) = plan([make_gradient(20_000, ranks=4)], DCTConfig(gradient_scheme="gather"), True)
    link = Link(1.25e8, 2e-4)
    decision = decide(replace(plain.exchange, start_s=start_s), DCTConfig(gradient_scheme="gather"), lambda _: link)
    assert decision.scheme == scheme
    assert decision.dense_seconds == pytest.approx(0.96e-3 + 6 * 2e-4)
    if scheme == "gather":
        assert plain.offer is not None
        assert decision.seconds == pytest.approx(start_s + plain.offer.traffic.seconds(link))


def test_latency_decides_between_schemes() -> None:
    """With 4 ranks "owner" sends fewer bytes in 4 hops, "gather" more bytes in 3."""
    site = make_gradient(10**6, ranks=4, rank=1)
    found = [plan([site], DCTConfig(), True, lambda _, link=link: link)[0].scheme for link in (Link(1e6, 1e-6), Link(1e9, 1.0))]
    assert found == ["owner", "gather"]


def test_of_two_schemes_that_take_about_as_long_the_one_with_fewer_bytes_is_taken() -> None:
    site, link = make_gradient(80_000, ranks=4, rank=1), Link(1.25e8)
    gathered, owned = (plan([site], DCTConfig(gradient_scheme=scheme), True, lambda _: link)[0] for scheme in ("gather", "owner"))
    assert gathered.seconds is not None
    assert owned.seconds is not None
    assert gathered.seconds < owned.seconds < 1.25 * gathered.seconds
    assert plan([site], DCTConfig(), True, lambda _: link)[0].scheme == "owner"


def test_the_rate_decides_about_rows() -> None:
    found = [plan([make_site(shape=(64, 512))], DCTConfig(), False, lambda _, link=link: link)[0] for link in (Link(1e6), Link(1e13, 1e-9))]
    assert [decision.scheme for decision in found] == ["row_threshold", "dense"]
    assert "on a link of" in found[1].reason


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("latency_s", [1e-9, 1.0])
def test_rows_are_encoded_where_a_fifth_is_saved_whatever_their_number_and_the_latency(rows: int, latency_s: float) -> None:
    def decided(link: Link | None) -> Decision:
        return plan([make_site(shape=(rows, 512))], DCTConfig(), False, lambda _: link)[0]

    encoded = decided(None)
    dense, sent = encoded.exchange.dense_traffic, encoded.traffic
    assert sent.hops == dense.hops
    crossing = float(dense.wire - Fraction(5, 4) * sent.wire) / (1.25 * sent.memory_bytes / 8e9)
    found = [decided(Link(factor * crossing, latency_s, 8e9)).scheme for factor in (0.98, 1.02)]
    assert found == ["row_threshold", "dense"]


def test_a_link_is_asked_for_only_where_a_scheme_makes_an_offer() -> None:
    asked: list[str] = []

    def link_of(group: str) -> Link | None:
        asked.append(group)
        return None

    plan([make_gradient(64, ranks=2), make_site("all_to_all_single", ranks=1)], DCTConfig(), True, link_of)
    assert asked == []
    plan([make_gradient(4096, ranks=2)], DCTConfig(), True, link_of)
    assert len(asked) == 1


def test_an_earlier_link_that_resembles_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "cache_dir", lambda: str(tmp_path / "new"))
    monkeypatch.setattr(links_module, "_hosts", lambda group: "here")
    first, near, far = Link(1e8, 1e-4, 1e9), Link(1.5e8, 0.8e-4, 2e9), Link(3e8, 1e-4, 1e9)
    found = [links_module._remembered(link, None) for link in (first, near, far, near)]  # type: ignore[arg-type]
    assert found == [first, first, far, far]
    assert json.loads((tmp_path / "new" / "dct_links.json").read_text())["here"]["bytes_per_s"] == 3e8


def test_a_broken_memory_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links_module, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(links_module, "_hosts", lambda group: "here")
    (tmp_path / "dct_links.json").write_text("{")
    assert links_module._remembered(Link(1.0), None) == Link(1.0)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "dct_links.json").read_text())["here"]["latency_s"] == ETHERNET_LATENCY_S
