"""The bytes that the plan promises, worked out by hand."""

from fractions import Fraction
from typing import Any

import pytest
import torch

from dct_compile.config import DCTConfig
from dct_compile.passes.plan import plan
from dct_compile.schemes.quantized_rows import QuantizedRows
from dct_compile.schemes.threshold import Gather
from dct_compile.schemes.threshold_owner import Owner
from dct_compile.traffic import share_leaving
from tests.hand_made_sites import decide, make_gradient, make_site

ACTIVATION_BYTES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, int, int]] = {
    # 4 of 64 kept: 4 * (2 + 1) = 12 bytes a row, 192 for 16 rows; three quarters of it leave the rank. Dense: 4096 bytes.
    "all_to_all": ("all_to_all_single", {}, {}, 4, 3072, 144),
    "all_gather": ("all_gather_into_tensor", {}, {}, 4, 3 * 4096, 3 * 192),
    "reduce_scatter": ("reduce_scatter_tensor", {}, {}, 4, 3072, 144),
    "all_reduce": ("all_reduce", {}, {}, 4, 6144, 3 * 192),
    "all_reduce on two ranks": ("all_reduce", {"ranks": 2}, {}, 4, 4096, 192),
    "uneven": ("all_to_all_single", {"splits": [8, 0, 4, 4]}, {}, 4, 2048, 96),
    "uneven, second rank": ("all_to_all_single", {"splits": [8, 0, 4, 4], "rank": 1}, {}, 4, 4096, 192),
    "no rows": ("all_to_all_single", {"shape": (0, 64)}, {}, 4, 0, 0),
    "float32 values": ("all_to_all_single", {}, {"mp_value_dtype": "float32"}, 4, 3072, 16 * 4 * 5 * 3 // 4),
    "laplace has room for 10 % more": ("all_to_all_single", {}, {"threshold": "laplace"}, 5, 3072, 16 * 5 * 3 * 3 // 4),
    "fixed has room for 10 % more": ("all_to_all_single", {}, {"threshold": 0.5}, 5, 3072, 16 * 5 * 3 * 3 // 4),
    "sampled is exact here": ("all_to_all_single", {}, {"threshold": "sampled"}, 4, 3072, 144),
    "two-byte indices": ("all_to_all_single", {"shape": (16, 300)}, {}, 15, 14400, 16 * 15 * 4 * 3 // 4),
    "three dimensions": ("all_to_all_single", {"shape": (16, 2, 64)}, {}, 4, 6144, 288),
    "bfloat16 input": ("all_to_all_single", {"dtype": torch.bfloat16}, {}, 4, 1536, 144),
}


@pytest.mark.parametrize("name", ACTIVATION_BYTES)
def test_bytes_of_a_masked_site(name: str) -> None:
    collective, changes, options, slots, dense_bytes, wire_bytes = ACTIVATION_BYTES[name]
    decision = decide(make_site(collective, **changes), training=False, **options)
    assert decision.scheme == "row_threshold"
    assert (decision.offer.capacity, decision.dense_bytes, decision.wire_bytes) == (slots, dense_bytes, wire_bytes)


@pytest.mark.parametrize(
    ("collective", "backward", "shape", "dense_bytes", "wire_bytes"),
    [
        ("all_to_all_single", "all_to_all_single", (16, 64), 3072, 96),  # 16 * 4 values of 2 bytes, no index
        ("all_gather_into_tensor", "reduce_scatter_tensor", (64, 64), 12288, 384),
        ("reduce_scatter_tensor", "all_gather_into_tensor", (4, 64), 3072, 96),
        ("all_reduce", "all_reduce", (16, 64), 6144, 384),
    ],
)
def test_bytes_of_a_masked_backward(collective: str, backward: str, shape: tuple[int, int], dense_bytes: int, wire_bytes: int) -> None:
    forward = make_site(collective)
    gradient = make_site(backward, shape, kind="activation_gradient", twin=forward)
    decision = plan([forward, gradient], DCTConfig(), True)[1]
    assert (decision.scheme, decision.reason) == ("row_threshold", "the forward's mask, values only")
    assert (decision.offer.capacity, decision.dense_bytes, decision.wire_bytes) == (4, dense_bytes, wire_bytes)


@pytest.mark.parametrize(
    ("codec", "bits", "wire_bytes"),
    [("int8", 8, 16 * (2 + 64) * 3 // 4), ("int4", 4, 16 * (2 + 32) * 3 // 4)],
)
def test_embeddings_are_quantised_both_ways(codec: str, bits: int, wire_bytes: int) -> None:
    forward = make_site(kind="embedding", origin="embedding")
    backward = make_site(kind="embedding_gradient", twin=forward)
    for decision in plan([forward, backward], DCTConfig(embedding_codec=codec, mp_density=1), True):
        assert isinstance(decision.offer, QuantizedRows)
        assert decision.offer.coding.bits == bits
        assert (decision.reason, decision.wire_bytes) == (f"{codec} rows with stochastic rounding", wire_bytes)


def test_embeddings_are_masked_on_request() -> None:
    forward = make_site(kind="embedding", origin="embedding")
    backward = make_site(kind="embedding_gradient", twin=forward)
    decisions = plan([forward, backward], DCTConfig(embedding_codec="threshold"), True)
    assert [(item.scheme, item.offer.capacity) for item in decisions] == [("row_threshold", 4), ("row_threshold", 4)]


# density .01 of 4096 elements: at most 46 entries (capacity_factor 1.1), 3 bytes each, and 16 blocks of 1 byte: 154, padded to 156.
# Owner: 2, 4 or 64 chunks of 23, 12 or 3 entries and 8, 4 or 1 blocks: 77, 40 or 10 bytes, padded to 80, 40 or 12; sent twice.
@pytest.mark.parametrize(
    ("ranks", "gather_bytes", "owner_bytes", "dense_bytes"),
    [(2, 156, 2 * 80, 16384), (4, 3 * 156, 6 * 40, 24576), (64, 63 * 156, 126 * 12, 32256)],
)
def test_gather_or_owner_whichever_sends_less(ranks: int, gather_bytes: int, owner_bytes: int, dense_bytes: int) -> None:
    found = {choice: decide(make_gradient(4096, ranks=ranks, rank=1), gradient_scheme=choice) for choice in ("gather", "owner", "auto")}
    assert {choice: item.wire_bytes for choice, item in found.items()} == {
        "gather": gather_bytes,
        "owner": owner_bytes,
        "auto": min(gather_bytes, owner_bytes),
    }
    assert {item.dense_bytes for item in found.values()} == {dense_bytes}
    assert found["auto"].reason == ("gather, density 0.01" if ranks == 2 else "owner, density 0.01")
    assert found["auto"].offers == {"gather": gather_bytes, "owner": owner_bytes}
    gathered, owned = found["gather"].offer, found["owner"].offer
    assert isinstance(gathered, Gather)
    assert isinstance(owned, Owner)
    assert (gathered.codec.layout.chunks, gathered.codec.layout.chunk) == (1, -1)
    layouts = owned.codec.layout, owned.owner_codec.layout
    assert [(layout.chunks, layout.chunk) for layout in layouts] == [(ranks, -1), (ranks, 1)]


def test_bucket_with_dense_members() -> None:
    decision = decide(make_gradient(64, 4096, 256, ranks=2), exempt=["p2"])
    assert isinstance(decision.offer, Gather)
    assert decision.reason == "gather, density 0.01; dense: p0, p2"
    assert decision.offer.codec.layout.segments == ((64, 4096),)
    assert [segment.parameter.name for segment in decision.offer.members.rest] == ["p0", "p2"]
    assert decision.offer.members.numel == 64 + 4096 + 256
    assert decision.wire_bytes == 156 + (64 + 256) * 4  # a ring all_reduce on two ranks sends its input once
    assert decision.dense_bytes == 4416 * 4


@pytest.mark.parametrize(
    ("scheme", "ranks", "numel", "messages", "sent"),
    [
        ("gather", 2, 100, 1, 156 + 400),
        ("gather", 4, 100, 1, 3 * (156 + 400)),  # 600 bytes more than an all_reduce save its message
        ("gather", 32, 100, 1, 31 * (156 + 400)),
        ("gather", 64, 100, 2, 63 * 156 + Fraction(2 * 63 * 400, 64)),  # behind the payload it would take 24413 bytes more
        ("owner", 4, 100, 2, 6 * (40 + 100)),
        ("owner", 4, 99, 2, 6 * (40 + 100)),  # the last share is padded
        ("gather", 2, 4097, 2, 156 + 4097 * 4),
        ("owner", 2, 4097, 3, 2 * 80 + 4097 * 4),
    ],
)
def test_small_rest_rides_behind_the_payload(scheme: str, ranks: int, numel: int, messages: int, sent: int | Fraction) -> None:
    offer = decide(make_gradient(4096, numel, ranks=ranks, rank=1), exempt=["p1"], gradient_scheme=scheme).offer
    assert offer is not None
    assert (offer.traffic.messages, offer.traffic.wire) == (messages, sent)


@pytest.mark.parametrize(
    ("collective", "ranks", "sent"),
    [
        ("all_reduce", 4, 150),
        ("all_reduce_coalesced", 4, 150),
        ("all_gather_into_tensor", 4, 300),
        ("reduce_scatter_tensor", 4, 75),
        ("all_to_all_single", 4, 75),
        ("broadcast", 4, 75),
        ("all_reduce", 1, 0),
        ("all_gather_into_tensor", 1, 0),
        ("broadcast", 1, 0),
    ],
)
def test_bytes_of_dense_collectives(collective: str, ranks: int, sent: int) -> None:
    site = make_site(collective, ranks=ranks)
    assert site.collective.sent(100, ranks).wire == sent


def test_share_of_uneven_splits() -> None:
    assert share_leaving([2, 6], 0) == 0.75
    assert share_leaving([0, 0], 0) == 0.0
