"""Trainings as users write them, to be audited on several ranks.

Each is a generator: it yields the modules to audit before it trains them.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from dct_compile.backend import dct
from tests.audited_models import Critic, Net


@dataclass
class Trainee:
    """A model as it is trained: ``call`` is compiled; ``ddp`` is ``None`` under ``data_parallel``."""

    net: nn.Module
    call: Callable[[Tensor], Tensor]
    ddp: DistributedDataParallel | None

    @classmethod
    def of(cls, net: nn.Module, wrapping: str, options: dict[str, Any], **settings: Any) -> "Trainee":
        """Wraps ``net``: "inside" of DDP or "outside" of it the compilation, or "data_parallel"."""
        if wrapping == "data_parallel":
            return cls(net, torch.compile(net, backend=dct, options={**options, "data_parallel": True, "audit": True}), None)
        if wrapping == "inside":
            module = DistributedDataParallel(torch.compile(net, backend=dct, options=options), **settings)
            return cls(net, module, module)
        module = DistributedDataParallel(net, **settings)
        return cls(net, torch.compile(module, backend=dct, options=options), module)


@dataclass(frozen=True)
class Setting:
    """Where and how a training runs. ``wrapping``: see :meth:`Trainee.of`."""

    rank: int
    wrapping: str
    options: dict[str, Any]
    steps: int = 6

    def wrap(self, net: nn.Module, **settings: Any) -> Trainee:
        return Trainee.of(net, self.wrapping, self.options, **settings)

    def batch(self, step: int, rows: int = 8) -> Tensor:
        return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1000 * step + self.rank))


def loss_of(output: Tensor) -> Tensor:
    return (output - 1).square().mean()


def plain(net: nn.Module, setting: Setting, optimizer: Any = torch.optim.SGD, **settings: Any) -> Iterator[nn.Module]:
    trainee = setting.wrap(net, **settings)
    yield net
    stepper = optimizer(net.parameters(), lr=0.05)
    for step in range(setting.steps):
        loss_of(trainee.call(setting.batch(step))).backward()
        stepper.step()
        stepper.zero_grad(set_to_none=step % 2 == 0)


def closure(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    trainee = setting.wrap(net)
    yield net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(setting.steps):

        def compute(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(trainee.call(setting.batch(step)))
            loss.backward()
            return loss

        optimizer.step(compute)


def skipped_batches(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    trainee = setting.wrap(net)
    yield net
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(2 * setting.steps):
        loss_of(trainee.call(setting.batch(step))).backward()
        if step % 3 != 1 and step != 0:
            optimizer.step()
        optimizer.zero_grad(set_to_none=step % 4 < 2)


def accumulation(net: nn.Module, setting: Setting, synchronised: bool) -> Iterator[nn.Module]:
    trainee = setting.wrap(net)
    yield net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(setting.steps):
        for part in range(3):
            local = part < 2 and not synchronised and trainee.ddp is not None
            with trainee.ddp.no_sync() if local and trainee.ddp is not None else nullcontext():
                loss_of(trainee.call(setting.batch(3 * step + part))).backward()
        if step != 2:
            optimizer.step()
        optimizer.zero_grad()


def gan(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    """The step of the generator leaves a gradient in the discriminator, which is thrown away."""
    critic = nn.Sequential(Net(), Net())
    models = setting.wrap(net), setting.wrap(Critic(critic))
    yield net
    yield critic
    optimizers = [torch.optim.SGD(model.net.parameters(), lr=0.05) for model in models]
    for step in range(setting.steps):
        optimizers[0].zero_grad()
        models[1].call(models[0].call(setting.batch(step))).mean().backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        fake = models[0].call(setting.batch(step)).detach()
        (models[1].call(fake) - models[1].call(setting.batch(step + 100))).square().mean().backward()
        optimizers[1].step()


def sharpness_aware(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    """The first of two backwards (SAM) only shows the direction in which the loss grows; its gradient is thrown away."""
    trainee = setting.wrap(net)
    yield net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(setting.steps):
        loss_of(trainee.call(setting.batch(step))).backward()
        with torch.no_grad():
            ascent = [0.01 * parameter.grad for parameter in net.parameters() if parameter.grad is not None]
            for parameter, change in zip(net.parameters(), ascent, strict=True):
                parameter.add_(change)
        optimizer.zero_grad()
        loss_of(trainee.call(setting.batch(step))).backward()
        with torch.no_grad():
            for parameter, change in zip(net.parameters(), ascent, strict=True):
                parameter.sub_(change)
        optimizer.step()
        optimizer.zero_grad()


def two_optimizers(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    """Each steps its half of the model, in turns; what the other half's gradient would be is thrown away."""
    assert isinstance(net, Net)
    trainee = setting.wrap(net)
    yield net
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.05) for part in (net.a, net.b)]
    for step in range(setting.steps):
        loss_of(trainee.call(setting.batch(step))).backward()
        optimizers[step % 2].step()
        net.zero_grad()


def loss_scale(net: nn.Module, setting: Setting, **choice: Any) -> Iterator[nn.Module]:
    """A gradient scaler backs off at batches of one rank that are not finite, and is raised by hand."""
    trainee = setting.wrap(net)
    yield net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, **choice)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(2 * setting.steps):
        loss = loss_of(trainee.call(setting.batch(step)))
        if setting.rank == 1 and step in (0, 4, 5, 6):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**14 if step == 8 else None)
        optimizer.zero_grad()


def uneven_inputs(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    """Rank 0 runs out of inputs first. At the end, the others' model is its model, too."""
    trainee = setting.wrap(net)
    assert trainee.ddp is not None
    yield net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with Join([trainee.ddp]):
        for step in range(setting.steps if setting.rank == 0 else 2 * setting.steps):
            loss_of(trainee.call(setting.batch(step))).backward()
            optimizer.step()
            optimizer.zero_grad()


def unfrozen(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    """A layer is frozen at first. DDP is wrapped anew when it is thawed, and when it is frozen again."""
    assert isinstance(net, Net)
    yield net
    for phase in range(3):
        net.a.requires_grad_(phase == 1)
        trainee = setting.wrap(net)
        optimizer = torch.optim.SGD([parameter for parameter in net.parameters() if parameter.requires_grad], lr=0.05)
        for step in range(setting.steps):
            loss_of(trainee.call(setting.batch(10 * phase + step))).backward()
            optimizer.step()
            optimizer.zero_grad()


def copied(net: nn.Module, setting: Setting) -> Iterator[nn.Module]:
    """An average of the model (EMA) is kept beside it and evaluated."""
    trainee = setting.wrap(net)
    yield net
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for step in range(setting.steps):
        loss_of(trainee.call(setting.batch(step))).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(parameter, 0.1)
            average(setting.batch(step))
            trainee.call(setting.batch(step, rows=3))
