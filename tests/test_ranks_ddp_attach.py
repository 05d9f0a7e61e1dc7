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
WEIGHTS = ["bottom.weight", "middle.weight", "side.weight", "top.weight"]


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
    loss_of(compiled(batch(rank, 3))).backward()
    weights = [parameter.grad for parameter in module.parameters() if parameter.grad is not None and parameter.dim() == 2]
    zeros = torch.cat([grad.flatten() for grad in weights]).eq(0).float().mean().item()
    return Trained(digests, sorted(dct_compile.state_dict(module)), zeros)


def options_of(scheme: str) -> Options:
    return {"dp_density": DENSITY, "dp_value_dtype": "float32", "gradient_scheme": scheme}


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
    net = Net()
    net.middle.requires_grad_(False)
    audited(*ddp_of(net, options, inside), rank)
    audited(*ddp_of(net.requires_grad_(True), options, inside), rank)
    net.zero_grad()
    dct_compile.load_state_dict(net, {})
    return [audited(*ddp_of(net, options, inside), rank)]


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
            assert trained.state == WEIGHTS
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
        assert mine.state == ["bottom.0.weight", "top.weight"]
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


def not_reached(rank: int, world_size: int) -> list[str]:
    models = [ddp_of(Net(), {}, inside=False)[1]]
    models += [ddp_of(nn.Sequential(nn.Linear(16, 64), nn.ReLU()), {}, inside=False)[1] for _ in range(1)]
    for step in range(3):
        for model in models:
            loss_of(model(batch(rank, step))).backward()
    return list(dct_compile.report().notes)


def test_a_module_that_no_graph_runs_in_is_named(ranks2: Ranks) -> None:
    for notes in ranks2(not_reached):
        assert [note.partition(",")[0] for note in notes] == ["no graph of backend 'dct' runs inside of DDP(Sequential)"]


class Halves(nn.Module):
    """Two halves with options of their own."""

    def __init__(self, *options: Options) -> None:
        super().__init__()
        halves = [nn.Linear(16, 64), nn.Linear(64, 64)]
        self.bottom, self.top = (torch.compile(half, backend=dct, options=given) for half, given in zip(halves, options, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.bottom(x))


def with_options(rank: int, world_size: int, first: Options, other: Options) -> tuple[list[str], list[str]]:
    module = DistributedDataParallel(Halves(first, other))
    for step in range(2):
        loss_of(module(batch(rank, step))).backward()
    report = dct_compile.report()
    return [site.reason for site in report.sites], list(report.notes)


@pytest.mark.parametrize(
    ("first", "other", "differences"),
    [
        (
            {"dp_density": 0.02},
            {"dp_density": 0.05, "rank": 2},
            "option 'dp_density' is 0.02 there and 0.05 in another graph; option 'rank' is 1 ",
        ),
        ({"mp_density": 0.02}, {"mp_density": 0.05}, ""),
    ],
)
def test_the_options_of_the_first_graph_hold(ranks2: Ranks, first: Options, other: Options, differences: str) -> None:
    for (reason,), notes in ranks2(with_options, first, other):
        assert reason.startswith(f"gather, density {first.get('dp_density', 0.01)}; dense: ")
        assert len(notes) == bool(differences)
        assert all(
            f"the gradients of Halves travel by the options of the first graph that ran inside of its DDP: {differences}" in note
            for note in notes
        )


def averaged_twice(rank: int, world_size: int) -> str:
    net = Net()
    compiled: Any = torch.compile(net, backend=dct, options={"data_parallel": True})
    loss_of(compiled(batch(rank, 0))).backward()
    try:
        DistributedDataParallel(compiled)(batch(rank, 1))
    except ValueError as error:
        return str(error)
    return ""


def test_gradients_that_would_be_averaged_twice_are_an_error(ranks2: Ranks) -> None:
    assert all("gradients would be averaged twice" in message for message in ranks2(averaged_twice))


def hooked(rank: int, world_size: int) -> list[str]:
    module, compiled = ddp_of(Net(), options_of("gather"), inside=False)
    module._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    train(module, compiled, rank, range(2))
    return [site.reason for site in dct_compile.report().sites]


def test_a_hook_of_torchs_own_stays_in_place(ranks2: Ranks) -> None:
    assert ranks2(hooked) == [["DDP has a communication hook of its own"]] * 2
