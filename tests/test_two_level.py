"""Gradients at two levels: what the plan decides, and what is sent, without ranks."""

from fractions import Fraction

import pytest
import torch

from dct_compile.config import DCTConfig
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.inspection import fake_ranks
from dct_compile.link import Link
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.plan import decide_outside
from dct_compile.schemes import two_level


@pytest.mark.parametrize(("inside_bytes_per_s", "scheme"), [(1e10, "two_level"), (6e8, "owner"), (1e8, "owner")])
def test_the_rate_inside_of_a_host_decides(inside_bytes_per_s: float, scheme: str) -> None:
    """The second one is within a quarter of "owner", and leaves more bytes to the host than it saves on the wire."""
    link = Link(1.25e7, 1e-4, 1e11, inside_bytes_per_s)
    with fake_ranks(8) as group:
        parameters = segments_of([Parameter(0, "weight", (2000, 2000))])
        exchange = gradient_exchange(ALL_REDUCE, parameters, torch.float32, group, per_host=4)
        assert decide_outside(exchange, DCTConfig(), lambda _: link).scheme == scheme


@pytest.mark.parametrize(("hosts", "rides"), [(2, True), (128, False)])
def test_the_rest_rides_where_that_sends_little(hosts: int, rides: bool) -> None:
    """An all_gather sends it to every host, an all_reduce twice."""
    members = [Parameter(0, "weight", (400, 400)), Parameter(1, "bias", (16000,))]
    config = DCTConfig(exempt=("bias",))
    with fake_ranks(8 * hosts) as group:
        exchange = gradient_exchange(ALL_REDUCE, segments_of(members), torch.float32, group, per_host=8)
        made = two_level.offer(exchange, config)
    assert isinstance(made, two_level.TwoLevel)
    assert (made.rider is not None) == rides
    payload = made.codec.layout.payload_bytes
    rest = 4 * 2000 * (1 if rides else Fraction(2 * (hosts - 1), hosts))
    assert made.traffic.wire == payload * (hosts - 1) + rest
