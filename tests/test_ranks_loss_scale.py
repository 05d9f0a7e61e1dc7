"""Gradient scalers on several ranks: a training comes out as without one, whichever scaler belongs to which loss.

Factors that are powers of two change no value, so parameters are compared bit for bit.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import dct_compile
from dct_compile.backend import dct
from tests import ranks_fsdp
from tests.audited_models import Net
from tests.audited_trainings import Setting, loss_of
from tests.rank_pool import Ranks
from tests.ranks import digest

pytestmark = pytest.mark.distributed
FEW: dict[str, Any] = {"dp_density": 0.05}
FACTORS = {"a": 2.0**16, "b": 2.0**8}
PLAIN, CHANGING = "........", "..aab.ab"
"""The scaler of each step; a point is none."""


class Recomputed(Net):
    """Its backward runs another one, which computes a part of the forward anew."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)  # type: ignore[no-any-return]


class Steps:
    """Steps of models, with the scalers that a letter stands for."""

    def __init__(self) -> None:
        self.scalers = {name: GradScaler("cpu", init_scale=factor, growth_interval=3) for name, factor in FACTORS.items()}

    def __call__(self, loss: Tensor, optimizer: torch.optim.Optimizer, name: str) -> None:
        scaler = self.scalers.get(name) or GradScaler(enabled=False)
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def trained(rank: int, world_size: int, wrapping: str, options: dict[str, Any], make: type[nn.Module], names: str) -> list[str]:
    """Returns a digest of the parameters after every step."""
    torch.manual_seed(0)
    setting, net = Setting(rank, wrapping, {**FEW, **options}), make()
    trainee, step, digests = setting.wrap(net), Steps(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for count, name in enumerate(names):
        step(loss_of(trainee.call(setting.batch(count))), optimizer, name)
        digests.append(digest(net.parameters()))
    return digests


@pytest.mark.parametrize(
    ("wrapping", "options", "make"),
    [
        ("inside", {}, Net),
        ("outside", {}, Net),
        ("outside", {"gradient_scheme": "powersgd"}, Net),
        ("outside", {"arrival": "late"}, Net),
        ("data_parallel", {}, Net),
        ("inside", {}, Recomputed),
    ],
)
def test_scalers_that_change_within_a_training(ranks2: Ranks, wrapping: str, options: dict[str, Any], make: type[nn.Module]) -> None:
    assert ranks2(trained, wrapping, options, make, CHANGING) == ranks2(trained, wrapping, options, make, PLAIN)


def of_copies(rank: int, world_size: int, names: str) -> dict[str, Tensor]:
    options = {**FEW, "parameter_codec": "dense", "sharded_gradients": "dense"}
    model, step = ranks_fsdp.sharded(init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("copies", "shards"))), Steps()
    compiled: Any = torch.compile(model, backend=dct, options=options)
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=0.05)
    for count, name in enumerate(names):
        step(ranks_fsdp.loss_of(compiled(ranks_fsdp.batch(rank, count))), optimizer, name)
    return ranks_fsdp.parameters(model)


def test_copies_of_shards(ranks2: Ranks) -> None:
    for found, wanted in zip(ranks2(of_copies, CHANGING), ranks2(of_copies, PLAIN), strict=True):
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def two_models(rank: int, world_size: int, names: str) -> list[str]:
    """A generator and a critic are trained in turn, each with the scaler that its letter stands for."""
    setting, step, digests = Setting(rank, "outside", FEW), Steps(), []
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(Net())
    calls = [setting.wrap(net).call for net in nets]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05) for net in nets]
    for count in range(5):
        for call, optimizer, name in zip(calls, optimizers, names, strict=True):
            step(loss_of(call(setting.batch(count))), optimizer, name)
        digests.append(digest(parameter for net in nets for parameter in net.parameters()))
    return digests


@pytest.mark.parametrize("names", ["ab", "a.", ".b", "aa"])
def test_two_models_with_scalers_of_their_own(ranks2: Ranks, names: str) -> None:
    assert ranks2(two_models, names) == ranks2(two_models, "..")


def resumed(rank: int, world_size: int, names: str) -> str:
    """Goes on from a saved state with another scaler."""
    torch.manual_seed(0)
    setting, net, step = Setting(rank, "outside", FEW), Net(), Steps()
    state = None
    for count, name in enumerate(names):
        net = copy.deepcopy(net)
        trainee, optimizer = setting.wrap(net), torch.optim.SGD(net.parameters(), lr=0.05)
        if state is not None:
            dct_compile.load_state_dict(net, state)
        for part in range(2):
            step(loss_of(trainee.call(setting.batch(2 * count + part))), optimizer, name)
        state = dct_compile.state_dict(net)
    return digest(net.parameters())


def test_a_saved_state_knows_no_scaler(ranks2: Ranks) -> None:
    assert ranks2(resumed, ".a.ba") == ranks2(resumed, ".....")
