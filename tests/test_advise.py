"""Predictions of a training step, against seconds and bytes worked out by hand."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from dct_compile.advice import Training, late_step_seconds, measured_compute_s, step_seconds
from dct_compile.config import DCTConfig
from dct_compile.exchange import GRADIENT, Exchange, Parameter, segments_of
from dct_compile.inspection import fake_ranks, inspected
from dct_compile.link import ONE_MACHINE, Link
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.decision import Decision
from dct_compile.passes.plan import decide
from dct_compile.reasons import Reason

GIGABIT = Link(1.25e8, 50e-6)


def bucket(config: DCTConfig, side: int, ranks: int = 2) -> Decision:
    """Decides by bytes about the gradient of one matrix of ``side`` x ``side`` float32."""
    segments = segments_of([Parameter(0, "weight", (side, side))])
    exchange = Exchange(
        ALL_REDUCE, GRADIENT, "weight", (side**2,), torch.float32, "0", ranks, 0, 4 * side**2, reduce_op="avg", segments=segments
    )
    return decide(exchange, config)


def training(*, side: int = 1000, buckets: int = 1, compute_s: float = 0.1, **options: Any) -> Training:
    config = DCTConfig(**options)
    return Training([bucket(config, side)] * buckets, config, compute_s)


def test_step_by_hand() -> None:
    # The backward is 2/3 of 0.3 s, so that it hides 0.2 s of the gradients, but none of the last bucket.
    assert step_seconds(0.3, 0.05, 0.4, 0.1) == pytest.approx(0.3 + 0.05 + 0.1 + 0.1)
    assert step_seconds(0.3, 0.0, 0.2, 0.1) == pytest.approx(0.4)
    assert step_seconds(0.3, 0.0, 0.1, 0.1) == pytest.approx(0.4)
    assert late_step_seconds(0.3, 0.05, 0.2) == pytest.approx(0.35)
    assert late_step_seconds(0.3, 0.05, 0.4) == 0.4


def test_dense_and_fp16_by_hand() -> None:
    one = training()
    # A ring of two ranks: 4 MB leave a rank, in two hops.
    assert one.sent("dense").gradients.wire_bytes == 4_000_000
    assert one.step_s("dense", GIGABIT) == pytest.approx(0.1 + 0.032 + 0.0001)
    # Half of that, and 12 bytes per element that the casts read and write at 8 GB/s.
    assert one.sent("fp16").gradients.wire_bytes == 2_000_000
    assert one.step_s("fp16", GIGABIT) == pytest.approx(0.1 + 0.016 + 0.0001 + 0.0015)
    # Of two buckets, the first one is sent while the backward runs for 20 ms.
    assert training(buckets=2, compute_s=0.03).step_s("dense", GIGABIT) == pytest.approx(0.03 + 0.0321 + 0.0121)


def test_compressed_step_is_the_offer_of_the_plan() -> None:
    one = training()
    offer = one.decisions[0].offer
    assert offer is not None
    sent = one.sent("dct", GIGABIT)
    assert sent.total == sent.gradients == sent.last == offer.traffic
    seconds = offer.traffic.hops * 50e-6 + float(offer.traffic.wire) / 1.25e8 + offer.traffic.memory_bytes / 8e9
    assert one.step_s("dct", GIGABIT) == pytest.approx(0.1 + seconds)
    assert one.step_s("dct", GIGABIT, late=True) == 0.1


@pytest.mark.parametrize("scheme", ["gather", "owner", "powersgd", "random_k"])
def test_crossing(scheme: str) -> None:
    one = training(gradient_scheme=scheme)
    offer = one.decisions[0].offer
    assert offer is not None
    assert offer.scheme == scheme
    dense, sent = offer.exchange.dense_traffic, offer.traffic
    # A fifth of dense is saved where the bytes saved take as long as more hops and passes over memory: 1.25 times what is sent counts.
    more_s = (1.25 * sent.hops - dense.hops) * 50e-6 + 1.25 * sent.memory_bytes / 8e9
    crossing = one.crossing(GIGABIT, [GRADIENT])
    assert crossing == pytest.approx(float(dense.wire - Fraction(5, 4) * sent.wire) / more_s, rel=0.011)
    assert [one.decided(Link(factor * crossing, 50e-6))[0].compressed for factor in (0.98, 1.02)] == [True, False]
    assert one.step_s("dct", Link(1.02 * crossing, 50e-6)) == one.step_s("dense", Link(1.02 * crossing, 50e-6))


def test_one_machine_stays_dense_for_its_own_reason() -> None:
    one = training()
    assert one.decided(ONE_MACHINE)[0].reason == Reason.ONE_MACHINE
    assert one.step_s("dct", ONE_MACHINE) == one.step_s("dense", ONE_MACHINE) == 0.1


def test_nothing_to_cross() -> None:
    assert training(dp_density=1).crossing(GIGABIT, [GRADIENT]) == 0
    assert training().crossing(GIGABIT, ["activation"]) == 0


def test_bytes_of_owner_do_not_grow_with_ranks() -> None:
    one = training(side=4000, gradient_scheme="owner")
    sent = {2**power: one.sent("dct", None, 2**power).gradients.wire_bytes for power in range(1, 11)}
    assert sent == {ranks: one.sent("owner", None, ranks).gradients.wire_bytes for ranks in sent}
    # As with the dense ring, a rank keeps its own share: that leaves (ranks - 1) / ranks.
    whole = [size * ranks / (ranks - 1) for ranks, size in sent.items()]
    assert max(whole) < 1.1 * min(whole)
    gathered = [one.sent("gather", None, ranks).gradients.wire_bytes for ranks in (2, 1024)]
    assert gathered[1] == 1023 * gathered[0]


def test_groups_that_average_gradients_keep_their_proportion() -> None:
    config = DCTConfig()
    both = Training([bucket(config, 100, ranks=2), bucket(config, 100, ranks=4)], config, 0.1)
    assert both.data_parallel_ranks == 2
    assert [exchange.ranks for exchange in both.exchanges(16)] == [16, 32]


def test_state_bytes() -> None:
    sizes = training().state_bytes(None)
    assert sizes["residual"] == 4_000_000
    assert sizes["threshold"] == 4
    assert sizes["copy for undo_discarded"] == sum(sizes.values()) / 2
    assert "copy for undo_discarded" not in training(undo_discarded=False).state_bytes(None)
    assert training().state_bytes(ONE_MACHINE) == {}


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_hook_of_the_users_stays_on_every_link() -> None:
    with fake_ranks(4):
        model = DistributedDataParallel(Affine())
        model.register_comm_hook(None, fp16_compress_hook)
        _, decisions = inspected(model, (torch.randn(2, 64),), {}, {"link": None})
    assert [decision.reason for decision in decisions] == [Reason.OWN_HOOK]
    one = Training(decisions, DCTConfig(), 0.1)
    assert one.sent("dct", Link(1e3)) == one.sent("dense") == one.sent("gather")
    assert one.sent("dense").gradients.wire_bytes == 2 * 3 * 4 * (64 * 64 + 64) // 4


def test_timing_changes_nothing() -> None:
    model = Affine()
    before = torch.random.get_rng_state()
    assert 0 < measured_compute_s(model, (torch.randn(2, 64),), {}) < 60
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before.equal(torch.random.get_rng_state()) is False  # the input was drawn
    with pytest.raises(ValueError, match="no result of the model has a gradient"):
        measured_compute_s(lambda x: x.sum(), (torch.ones(2),), {})
    with pytest.raises(ValueError, match="on the device 'meta', where nothing is computed"):
        measured_compute_s(Affine().to("meta"), (torch.empty(2, 64, device="meta"),), {})
