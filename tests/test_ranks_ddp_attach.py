"""Every DDP module that a compiled graph runs in is compressed, wherever Dynamo has the graph from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import GROUP_TIMEOUT, Ranks
from tests.ranks_audit import Auditor
from tests.ranks_ddp import Net, Options, batch, ddp_of, loss_of, train

pytestmark = pytest.mark.distributed

DENSITY = 0.05
NAMES = [f"{layer}.{kind}" for layer in ("bottom", "middle", "side", "top") for kind in ("bias", "weight")]


@dataclass(frozen=True)
class Trained:
    """``digests``: of the parameters at every step. ``state``: the parameters that have some. ``zeros``: their share of the gradient."""

    digests: list[str]
    state: list[str]
    zeros: float


def audited(module: nn.Module, compiled: Callable[..., Tensor], rank: int) -> Trained:
    auditor = Auditor(module, DENSITY, torch.float32)
    digests = train(module, compiled, rank, range(3), auditor)
    auditor.finish()
    return Trained(digests, *held_by(module, compiled, rank))


def held_by(module: nn.Module, compiled: Callable[..., Tensor], rank: int) -> tuple[list[str], float]:
    loss_of(compiled(batch(rank, 3))).backward()
    weights = [parameter.grad for parameter in module.parameters() if parameter.grad is not None and parameter.dim() == 2]
    zeros = torch.cat([grad.flatten() for grad in weights]).eq(0).float().mean().item()
    module.zero_grad()
    return sorted(dct_compile.state_dict(module)), zeros


def options_of(scheme: str) -> Options:
    return {"dp_density": DENSITY, "dp_value_dtype": "float32", "min_numel": 1, "gradient_scheme": scheme}


def warm(net: nn.Module, options: Options, rank: int) -> None:
    """Trains and evaluates ``net`` compiled, before anything wraps it."""
    compiled: Any = torch.compile(net, backend=dct, options=options)
    loss_of(compiled(batch(rank, 0))).backward()
    net.zero_grad()
    with torch.no_grad():
        compiled(batch(rank, 0))


def warmed(rank: int, options: Options, inside: bool, alone: bool = False) -> list[Trained]:
    net = Net()
    if rank == 0 or not alone:
        warm(net, options, rank)
    module, compiled = ddp_of(net, options, inside)
    if rank == 0 and alone:
        with torch.no_grad():
            compiled(batch(rank, 0))
    return [audited(module, compiled, rank)]


def two(rank: int, options: Options, inside: bool) -> list[Trained]:
    return [audited(*ddp_of(Net(), options, inside), rank) for _ in range(2)]


def wrapped_anew(rank: int, options: Options, inside: bool) -> list[Trained]:
    """Freezes a layer, and thaws it: DDP is wrapped anew each time, with other buckets. One audit spans all of it."""
    net = Net()
    auditor, digests = Auditor(net, DENSITY, torch.float32), []
    for frozen in (False, True, False):
        net.middle.requires_grad_(not frozen)
        module, compiled = ddp_of(net, options, inside)
        digests += train(module, compiled, rank, range(3), auditor)
    auditor.finish()
    return [Trained(digests, *held_by(module, compiled, rank))]


def new_group(rank: int, options: Options, inside: bool, compiled_before: bool = False) -> list[Trained]:
    store, size, net = _get_default_store(), dist.get_world_size(), Net()
    if not compiled_before:
        audited(*ddp_of(Net(), options, inside), rank)
    dist.barrier()
    dist.destroy_process_group()
    if compiled_before:
        warm(net, options, rank)
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    return [audited(*ddp_of(net, options, inside), rank)]


SCENARIOS: dict[str, Callable[[int, Options, bool], list[Trained]]] = {
    "warmed": warmed,
    "warmed on rank 0 alone": lambda rank, options, inside: warmed(rank, options, inside, alone=True),
    "two": two,
    "wrapped anew": wrapped_anew,
    "new group": new_group,
    "compiled before there was a group": lambda rank, options, inside: new_group(rank, options, inside, compiled_before=True),
}


def scenario(rank: int, world_size: int, name: str, scheme: str, inside: bool) -> list[Trained]:
    return SCENARIOS[name](rank, options_of(scheme), inside)


def check(outcomes: list[list[Trained]]) -> None:
    for models in zip(*outcomes, strict=True):
        assert all(trained.digests == models[0].digests for trained in models)
        for trained in models:
            assert trained.state == NAMES
            assert trained.zeros > 0.8


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_dynamo_has_compiled_before_does_not_matter(ranks2: Ranks, name: str, inside: bool) -> None:
    check(ranks2(scenario, name, "gather", inside))


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
@pytest.mark.parametrize("name", ["warmed on rank 0 alone", "two"])
def test_what_dynamo_has_compiled_before_does_not_matter_to_owners(ranks3: Ranks, name: str, inside: bool) -> None:
    check(ranks3(scenario, name, "owner", inside))


def run_by_rank_0(rank: int, world_size: int) -> tuple[float, int]:
    """Trains uncompiled, after rank 0 alone has evaluated and has run a backward without synchronisation, compiled."""
    module, compiled = ddp_of(Net(), options_of("gather"), inside=False)
    if rank == 0:
        with torch.no_grad():
            compiled(batch(rank, 0))
        with module.no_sync():
            loss_of(compiled(batch(rank, 0))).backward()
        module.zero_grad()
    loss_of(module(batch(rank, 1))).backward()
    return module.module.top.weight.grad.eq(0).float().mean().item(), len(dct_compile.state_dict(module))


def test_a_rank_alone_attaches_nothing(ranks2: Ranks) -> None:
    """The other rank would wait for an uncompressed all_reduce."""
    for zeros, held in ranks2(run_by_rank_0):
        assert zeros < 0.5
        assert held == 0


class Parts(nn.Module):
    """Parts of torch's own classes, each under DDP: torch compiles none of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.ReLU()))
        self.top = DistributedDataParallel(nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.sin(self.bottom(x)))


def parts(rank: int, world_size: int, as_method: bool) -> tuple[list[Trained], list[str]]:
    trained = []
    for _ in range(2):
        model = Parts()
        if as_method:
            model.compile(backend=dct, options=options_of("gather"))
        trained.append(audited(model, model if as_method else torch.compile(model, backend=dct, options=options_of("gather")), rank))
    return trained, list(dct_compile.report().notes)


@pytest.mark.parametrize("as_method", [False, True])
def test_parts_that_torch_does_not_compile_are_compressed(ranks2: Ranks, as_method: bool) -> None:
    (first, notes), (second, _) = ranks2(parts, as_method)
    for mine, other in zip(first, second, strict=True):
        assert mine.digests == other.digests
        assert mine.state == ["bottom.0.bias", "bottom.0.weight", "top.bias", "top.weight"]
        assert mine.zeros > 0.8
    assert sum(note.startswith("parts of DDP's model run outside of compiled graphs: ") for note in notes) == 2
    assert not any("not wrapped in DDP" in note for note in notes)


def stacked(rank: int, world_size: int) -> list[Trained]:
    """DDP around DDP, each with its own parameters, twice."""
    trained = []
    for _ in range(2):
        net = Net()
        names = [name for name, _ in net.named_parameters()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names[:4])
        inner = DistributedDataParallel(net)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, [f"module.{name}" for name in names[4:]])
        outer = DistributedDataParallel(inner)
        trained.append(audited(outer, torch.compile(outer, backend=dct, options=options_of("gather")), rank))
    return trained


def test_modules_around_modules_are_compressed_too(ranks2: Ranks) -> None:
    check(ranks2(stacked))
