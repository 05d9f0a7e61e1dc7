"""Optimizers on several ranks: untouched at density 1, wrapped by others, adapted one by one; and what the report says of each."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, AdamW, Optimizer, RMSprop

import dct_compile
from tests.audited_models import Net
from tests.audited_trainings import Setting, loss_of
from tests.rank_pool import Ranks

pytestmark = pytest.mark.distributed
Options = dict[str, Any]
WAYS = ["inside", "outside", "data_parallel"]
FEW: Options = {"dp_density": 0.002}
"""An element waits 500 steps, longer than the second moment of ``adamw`` looks back."""
STEPS = 5


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, betas=(0.9, 0.99))


def train(
    setting: Setting,
    net: nn.Module,
    optimizer: Optimizer,
    call: Callable[[Tensor], Tensor],
    after_step: Callable[[], None] = lambda: None,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Returns the parameters after ``STEPS`` steps."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(call(setting.batch(step)))).backward()
        scaler.step(optimizer)
        scaler.update()
        after_step()
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def setting_and_net(rank: int, wrapping: str, options: Options) -> tuple[Setting, Net]:
    torch.manual_seed(0)
    return Setting(rank, wrapping, options), Net()


def untouched(rank: int, world_size: int, wrapping: str, options: Options) -> bool:
    """Trains beside an optimizer of copies that are given the same gradients; returns whether parameters and moments are the same bits."""
    setting, net = setting_and_net(rank, wrapping, options)
    twin = copy.deepcopy(net)
    trainee = setting.wrap(net)
    optimizer, alone, same = adamw(net.parameters()), adamw(twin.parameters()), []

    def compare() -> None:
        for parameter, copied in zip(net.parameters(), twin.parameters(), strict=True):
            assert parameter.grad is not None
            copied.grad = parameter.grad.clone()
        alone.step()
        for parameter, copied in zip(net.parameters(), twin.parameters(), strict=True):
            held, other = optimizer.state[parameter], alone.state[copied]
            same.append(torch.equal(parameter, copied) and all(torch.equal(held[name], other[name]) for name in ("exp_avg", "exp_avg_sq")))

    train(setting, net, optimizer, trainee.call, compare)
    return all(same)


@pytest.mark.parametrize("wrapping", WAYS)
def test_nothing_is_touched_at_density_one(ranks2: Ranks, wrapping: str) -> None:
    assert ranks2(untouched, wrapping, {"dp_density": 1, "first_moment": "bypass", "second_moment": "gaps"}) == [True] * 2


def test_a_touched_one_would_be_seen(ranks2: Ranks) -> None:
    assert ranks2(untouched, "inside", {}) == [False] * 2


def sharded(rank: int, world_size: int, wrapping: str, optimizer_class: Any, view: bool) -> tuple[list[bool], set[str | None], int]:
    """Trains with the states of the optimizer divided among the ranks.

    Returns:
        For each parameter, whether it is that of a training by an optimizer without a first moment; how the report says that parameters
        are stepped; the number of notes about unknown optimizers.
    """
    choice = {AdamW: {"betas": (0.9, 0.999)}, SGD: {"momentum": 0.9}}[optimizer_class]
    plain = {AdamW: {"betas": (0.0, 0.999)}, SGD: {}}[optimizer_class]
    setting, net = setting_and_net(rank, wrapping, {})
    twin = copy.deepcopy(net)
    trainee = setting.wrap(net)
    optimizer = ZeroRedundancyOptimizer(
        net.parameters(), optimizer_class=optimizer_class, lr=0.01, parameters_as_bucket_view=view, **choice
    )
    small = [parameter for parameter in twin.parameters() if parameter.ndim == 1]  # dense, so stepped as ever
    large = [parameter for parameter in twin.parameters() if parameter.ndim == 2]
    alone = [
        optimizer_class(small, lr=0.01, **choice),
        optimizer_class(large, lr=0.01 if optimizer_class is AdamW else 0.1, **plain),
    ]

    def follow() -> None:
        for parameter, copied in zip(net.parameters(), twin.parameters(), strict=True):
            assert parameter.grad is not None
            copied.grad = parameter.grad.clone()
        for item in alone:
            item.step()

    train(setting, net, optimizer, trainee.call, follow)
    same = [
        torch.allclose(parameter, copied, rtol=1e-5, atol=1e-7)
        for parameter, copied in zip(net.parameters(), twin.parameters(), strict=True)
    ]
    report = dct_compile.report()
    return same, {site.stepped for site in report.sites if site.stepped}, sum("is not known" in note for note in report.notes)


@pytest.mark.parametrize(
    ("wrapping", "optimizer", "view"), [("inside", AdamW, False), ("outside", AdamW, True), ("data_parallel", SGD, True)], ids=str
)
def test_states_that_are_divided_among_ranks(ranks2: Ranks, wrapping: str, optimizer: Any, view: bool) -> None:
    results = ranks2(sharded, wrapping, optimizer, view)
    assert [result[0] for result in results] == [[True] * 4] * 2
    assert [result[2] for result in results] == [0, 0]
    for _, stepped, _ in results:  # each rank steps one of the two matrices
        assert stepped <= {"bypass (1), by another rank (1)", "by another rank (1), bypass (1)"}
        assert stepped


def scaled(rank: int, world_size: int, options: Options, fused: bool, has_scaler: bool) -> dict[str, Tensor]:
    setting, net = setting_and_net(rank, "inside", options)
    trainee = setting.wrap(net)
    optimizer = AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.99), fused=fused)
    return train(setting, net, optimizer, trainee.call, scaler=torch.amp.GradScaler("cpu", 2.0**10) if has_scaler else None)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing(ranks2: Ranks, fused: bool) -> None:
    found, wanted = (ranks2(scaled, FEW, fused, has_scaler)[0] for has_scaler in (True, False))
    torch.testing.assert_close(found, wanted)


def adapted(rank: int, world_size: int, wrapping: str, moment: str, when: str) -> tuple[dict[str, Tensor], set[str | None]]:
    """Trains with an optimizer that was made ``when`` the model was wrapped ("before", "after"), and adapted; or ("") not adapted."""
    setting, net = setting_and_net(rank, wrapping, {**FEW, "first_moment": moment})
    made = adamw(net.parameters()) if when == "before" else None
    if made is not None:
        dct_compile.adapt(made)
    trainee = setting.wrap(net)
    optimizer = made or adamw(net.parameters())
    if when == "after":
        dct_compile.adapt(optimizer)
    found = train(setting, net, optimizer, trainee.call)
    return found, {site.stepped for site in dct_compile.report().sites if site.stepped}


@pytest.mark.parametrize("wrapping", ["outside", "data_parallel"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapted_optimizer_does_what_the_option_does(ranks2_once: Ranks, wrapping: str, when: str) -> None:
    (found, stepped), _ = ranks2_once(adapted, wrapping, "keep", when)
    (wanted, expected), _ = ranks2_once(adapted, wrapping, "bypass", "")
    (kept, as_ever), _ = ranks2_once(adapted, wrapping, "keep", "")
    assert stepped == expected == {"bypass + gaps"}
    assert as_ever == {"as ever"}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(kept["a.weight"], wanted["a.weight"])


def reported(rank: int, world_size: int, wrapping: str, options: Options) -> list[Any]:
    """Returns the report's and the monitor's words: before a step, after AdamW's, and after one of an optimizer that is not known."""
    setting, net = setting_and_net(rank, wrapping, options)
    trainee, found = setting.wrap(net), []
    monitor = dct_compile.monitor(every=1)
    for optimizer in (None, AdamW(net.parameters()), RMSprop(net.parameters(), momentum=0.9)):
        loss_of(trainee.call(setting.batch(0))).backward()
        if optimizer is not None:
            optimizer.step()
        monitor.step()
        sites = dct_compile.report().sites
        found.append([{site.stepped for site in places if site.stepped} for places in (sites, monitor.sites)])
    report = dct_compile.report()
    lines = report.table(width=120).splitlines()
    found.append(max(len(line) for line in lines if "note:" not in line))
    found.append(all("unknown optimizer RMSprop" in text for text in (str(report), report.table(120), report.to_json(), report.to_html())))
    return found


@pytest.mark.parametrize("wrapping", WAYS)
def test_the_report_says_of_each_gradient_how_its_parameters_are_stepped(ranks2: Ranks, wrapping: str) -> None:
    for found in ranks2(reported, wrapping, {}):
        assert found[:3] == [[{"not stepped yet"}] * 2, [{"bypass"}] * 2, [{"unknown optimizer RMSprop"}] * 2]
        assert found[3] <= 120
        assert found[4]


def gradients_of(setting: Setting, call: Callable[[Tensor], Tensor], optimizer: Optimizer, step: int) -> float:
    optimizer.zero_grad()
    loss = loss_of(call(setting.batch(step)))
    loss.backward()
    return loss.item()


def by_closure(rank: int, world_size: int, wrapping: str) -> tuple[bool, list[str]]:
    """Trains with gradients that closures make, from the first step on. Returns whether it is the training without, and the notes."""
    found = []
    for closes in (True, False):
        setting, net = setting_and_net(rank, wrapping, FEW)
        optimizer, call = adamw(net.parameters()), setting.wrap(net).call
        for step in range(STEPS):
            closure = partial(gradients_of, setting, call, optimizer, step)
            if not closes:
                closure()
            optimizer.step(closure if closes else None)  # type: ignore[arg-type]
        found.append([parameter.detach().clone() for parameter in net.parameters()])
    return all(map(torch.equal, *found)), [note for note in dct_compile.report().notes if "not known" in note]


@pytest.mark.parametrize("wrapping", WAYS)
def test_the_first_gradients_may_come_from_a_closure(ranks2: Ranks, wrapping: str) -> None:
    assert ranks2(by_closure, wrapping) == [(True, [])] * 2
