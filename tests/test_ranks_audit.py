"""An audit of trainings as users write them: nothing is lost, nothing comes twice, and the ranks stay equal."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import dct_compile
from tests import audited_trainings as trainings
from tests.audited_models import ChannelsLast, Checkpointed, Mixed, Net, Tied
from tests.audited_trainings import Setting
from tests.rank_pool import Ranks

pytestmark = pytest.mark.distributed
Options = dict[str, Any]
WAYS = [("inside", "gather"), ("outside", "owner"), ("data_parallel", "owner")]
FUSED = partial(torch.optim.SGD, fused=True)
EVERYWHERE: dict[str, tuple[Any, type[nn.Module]]] = {
    "plain": (trainings.plain, Net),
    "closure": (trainings.closure, Net),
    "fused optimizer": (partial(trainings.plain, optimizer=FUSED), Net),
    "tied weights": (trainings.plain, Tied),
    "bf16 beside fp32": (trainings.plain, Mixed),
    "channels_last": (trainings.plain, ChannelsLast),
    "activation checkpointing": (trainings.plain, Checkpointed),
    "skipped batches": (trainings.skipped_batches, Net),
    "accumulation": (partial(trainings.accumulation, synchronised=False), Net),
    "accumulation, synchronised": (partial(trainings.accumulation, synchronised=True), Net),
    "GAN": (trainings.gan, Net),
    "SAM": (trainings.sharpness_aware, Net),
    "two optimizers": (trainings.two_optimizers, Net),
    "loss scale": (trainings.loss_scale, Net),
    "loss scale, fused": (partial(trainings.loss_scale, fused=True), Net),
    "frozen and thawed": (trainings.unfrozen, Net),
    "average of the model": (trainings.copied, Net),
}
UNDER_DDP: dict[str, tuple[Any, type[nn.Module]]] = {
    "uneven inputs": (trainings.uneven_inputs, Net),
    "static_graph": (partial(trainings.plain, static_graph=True), Net),
    "bucket views": (partial(trainings.plain, gradient_as_bucket_view=True), Net),
    "unused parameters": (partial(trainings.plain, find_unused_parameters=True), Net),
}


def audited(rank: int, world_size: int, name: str, wrapping: str, options: Options) -> list[tuple[int, int, float]]:
    training, model = (EVERYWHERE | UNDER_DDP)[name]
    torch.manual_seed(0)
    with ExitStack() as stack:
        audits = [stack.enter_context(dct_compile.audit(net)) for net in training(model(), Setting(rank, wrapping, options))]
        results = [audit.check() for audit in audits]
    return [(result.steps, len(result.compressed), result.error) for result in results]


@pytest.mark.parametrize(("wrapping", "scheme"), WAYS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_nothing_is_lost(ranks2: Ranks, name: str, wrapping: str, scheme: str) -> None:
    check(ranks2(audited, name, wrapping, {"gradient_scheme": scheme, "dp_density": 0.02}))


@pytest.mark.parametrize(("wrapping", "scheme"), WAYS[:2])
@pytest.mark.parametrize("name", UNDER_DDP)
def test_nothing_is_lost_under_ddp(ranks2: Ranks, name: str, wrapping: str, scheme: str) -> None:
    check(ranks2(audited, name, wrapping, {"gradient_scheme": scheme, "dp_density": 0.02}))


@pytest.mark.parametrize("wrapping", ["inside", "outside", "data_parallel"])
@pytest.mark.parametrize("name", ["GAN", "skipped batches", "loss scale"])
def test_nothing_is_lost_on_three_ranks(ranks3: Ranks, name: str, wrapping: str) -> None:
    check(ranks3(audited, name, wrapping, {"gradient_scheme": "owner", "dp_density": 0.02}))


@pytest.mark.parametrize("scheme", ["powersgd", "random_k"])
@pytest.mark.parametrize("name", ["GAN", "loss scale"])
def test_other_schemes_lose_nothing(ranks2: Ranks, name: str, scheme: str) -> None:
    check(ranks2(audited, name, "inside", {"gradient_scheme": scheme, "dp_density": 0.02}))


def check(results: list[list[tuple[int, int, float]]]) -> None:
    """Every model was trained, and all of its matrices were compressed."""
    for steps, compressed, error in results[0]:
        assert steps >= 3
        assert compressed >= 1
        assert error < 1e-2  # of bfloat16; the audit itself knows the rounding of each dtype


def without_undo(rank: int, world_size: int, wrapping: str) -> str:
    try:
        audited(rank, world_size, "GAN", wrapping, {"undo_discarded": False})
    except dct_compile.AuditError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("wrapping", ["inside", "outside", "data_parallel"])
def test_an_audit_finds_gradients_that_come_back(ranks2: Ranks, wrapping: str) -> None:
    for message in ranks2(without_undo, wrapping):
        assert "0.a.weight: gradients and what was made of them differ by" in message


def one_rank_changes(rank: int, world_size: int) -> str:
    net = Net()
    with dct_compile.audit(net) as audit:
        for _ in trainings.plain(net, Setting(rank, "inside", {})):
            pass
        audit.check()
        with torch.no_grad():
            net.b.weight[3, 2] += rank
        try:
            audit.check()
        except dct_compile.AuditError as error:
            return str(error)
    return ""


def test_an_audit_finds_ranks_that_differ(ranks2: Ranks) -> None:
    assert ranks2(one_rank_changes) == ["b.weight: its values differ between the ranks"] * 2


def applied_by_hand(rank: int, world_size: int, wrapping: str, what: str) -> tuple[list[float], list[str]]:
    """One backward, then 150 of a zero loss: returns norms of the gradient, and of all that arrived after it. No optimizer is used."""
    net = Net()
    trainee = Setting(rank, wrapping, {"dp_density": 0.02}).wrap(net)
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(net(batch).square().mean(), net.a.weight)[0]
    (65536 * trainee.call(batch).square().mean()).backward()
    assert net.a.weight.grad is not None
    arrived = torch.zeros_like(wanted) if what == "discarded" else net.a.weight.grad / 65536
    if what == "discarded":
        dct_compile.discard_gradients(net)
        assert net.a.weight.grad is None
    if what == "rescaled":
        dct_compile.scale_residuals(net, 1 / 16)
    scale = 4096 if what == "rescaled" else 65536
    for _ in range(150):
        net.zero_grad()
        (0 * trainee.call(batch).square().mean()).backward()
        arrived += net.a.weight.grad / scale
    norms = [tensor.norm().item() for tensor in (wanted, arrived)]
    return norms, [note[:29] for note in dct_compile.report().notes]


@pytest.mark.parametrize("wrapping", ["inside", "outside", "data_parallel"])
@pytest.mark.parametrize("what", ["applied", "discarded", "rescaled"])
def test_gradients_without_an_optimizer(ranks2: Ranks, wrapping: str, what: str) -> None:
    for (wanted, arrived), notes in ranks2(applied_by_hand, wrapping, what):
        assert arrived == pytest.approx(0.0 if what == "discarded" else wanted, rel=1e-3)  # values travel as bfloat16
        assert notes == ["gradients were computed anew,"]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_residuals_take_finite_factors(factor: float) -> None:
    with pytest.raises(ValueError, match=r"factor is .*; allowed is a finite number above 0"):
        dct_compile.scale_residuals(Net(), factor)
