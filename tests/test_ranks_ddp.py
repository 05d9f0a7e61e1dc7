"""DistributedDataParallel over gloo ranks, audited at every step: wrapping orders, buckets, accumulation, unused and frozen parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.ranks import digest, fresh_compiler, run_ranks
from tests.ranks_audit import Auditor

SMALL_BUCKETS = 0.004
"""MB: a bucket for nearly every layer of ``Net``. Dynamo's own splitting at buckets must be off for less than 1 MB."""
Options = dict[str, Any]


class Net(nn.Module):
    """Two branches, one of which may be left out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.middle, self.top = nn.Linear(16, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 8)
        self.side = nn.Linear(16, width)

    def forward(self, x: Tensor, use_side: bool = True) -> Tensor:
        h = self.middle(torch.relu(self.bottom(x)))
        if use_side:
            h = h + self.side(x)
        return self.top(torch.relu(h))


class Part(nn.Module):
    """A part of a model with code of its own: Dynamo compiles no frame of torch's, such as that of a bare linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def train(
    module: nn.Module,
    compiled: Callable[..., Tensor],
    rank: int,
    steps: range,
    auditor: Auditor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    arguments: Callable[[int], tuple[Any, ...]] = lambda step: (),
) -> list[str]:
    """One digest of all parameters per step."""
    optimizer = optimizer or torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    dtype = next(module.parameters()).dtype
    digests = []
    for step in steps:
        if auditor is not None:
            auditor.begin()
        loss_of(compiled(batch(rank, step, dtype), *arguments(step))).backward()
        if auditor is not None:
            auditor.end()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(module.parameters()))
    return digests


def reasons() -> list[tuple[str, str]]:
    return [(site.decision, site.reason) for site in dct_compile.report().sites if site.kind == "gradient"]


def ddp_of(model: nn.Module, options: Options, inside: bool, **settings: Any) -> tuple[DistributedDataParallel, Any]:
    """The DDP module and what to call: compiled inside of DDP or around it."""
    if inside:
        module = DistributedDataParallel(torch.compile(model, backend=dct, options=options), **settings)
        return module, module
    module = DistributedDataParallel(model, **settings)
    return module, torch.compile(module, backend=dct, options=options)


def invariants(rank: int, world_size: int, steps: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    variants = [
        ("gather", "float32", torch.float32),
        ("gather", "bfloat16", torch.float32),
        ("owner", "bfloat16", torch.float32),
        ("owner", "float16", torch.float32),
        ("gather", "float16", torch.float32),
        ("gather", "bfloat16", torch.bfloat16),
    ]
    for scheme, value_dtype, dtype in variants:
        with fresh_compiler():
            options = {"dp_density": 0.05, "dp_value_dtype": value_dtype, "all_reduce": scheme, "refresh_interval": 4}
            module, compiled = ddp_of(Net().to(dtype), options, inside=scheme == "owner")
            auditor = Auditor(module, 0.05, getattr(torch, value_dtype))
            digests = train(module, compiled, rank, range(steps), auditor)
            auditor.finish()
            counted = [entry["counters"].tolist() for entry in dct_compile.state_dict(module).values()]
            results[f"{scheme} {value_dtype} {dtype}"] = digests, reasons(), auditor.compressed, counted
    return results


@pytest.mark.distributed
def test_the_invariants_hold_at_every_step_of_a_training() -> None:
    first, second = run_ranks(invariants, 2, 20)
    for name, (digests, decisions, compressed, counted) in first.items():
        assert digests == second[name][0], f"{name}: the ranks' parameters differ"
        assert len(set(digests)) == 20
        assert {decision for decision, _ in decisions} == {"compressed"}
        assert compressed == {"bottom.weight", "middle.weight", "top.weight", "side.weight"}
        assert {step for step, *_ in counted} == {20}
    plain = [result[0][-1] for result in first.values()]
    assert len(set(plain)) == len(plain), "every variant rounds or selects differently"


def scenarios(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    density = 0.05
    base: Options = {"dp_density": density, "dp_value_dtype": "float32"}

    def run(
        name: str,
        options: Options,
        inside: bool,
        model: nn.Module | None = None,
        arguments: Callable[[int], tuple[Any, ...]] = lambda step: (),
        **settings: Any,
    ) -> None:
        small = settings.get("bucket_cap_mb", 25) < 1
        with fresh_compiler(), torch._dynamo.config.patch(optimize_ddp=not small):
            module, compiled = ddp_of(model or Net(), {**base, **options}, inside, **settings)
            auditor = Auditor(module, density, torch.float32)
            digests = train(module, compiled, rank, range(6), auditor, arguments=arguments)
            auditor.finish()
            results[name] = digests, reasons(), sorted(dct_compile.state_dict(module))

    for scheme in ("gather", "owner"):
        run(f"{scheme} around", {"all_reduce": scheme}, inside=False)
        run(f"{scheme} inside", {"all_reduce": scheme}, inside=True)
        run(f"{scheme} buckets", {"all_reduce": scheme}, inside=True, bucket_cap_mb=SMALL_BUCKETS)
    run("views", {}, inside=True, gradient_as_bucket_view=True, bucket_cap_mb=SMALL_BUCKETS)
    run("static", {}, inside=True, static_graph=True)
    run("graph split at buckets", {"min_numel": 2000}, inside=False, model=Net(width=512), bucket_cap_mb=1)
    frozen = Net()
    frozen.middle.requires_grad_(False)
    run("frozen", {}, inside=True, model=frozen)
    run("exempt", {"exempt": ["top.*", "side.weight"]}, inside=True)
    run(
        "unused on one rank",
        {},
        inside=False,
        find_unused_parameters=True,
        arguments=lambda step: (step % 2 == 0 or rank == 0,),
        bucket_cap_mb=SMALL_BUCKETS,
    )
    run("never used", {}, inside=True, find_unused_parameters=True, arguments=lambda step: (False,))

    with fresh_compiler():
        module, compiled = ddp_of(Net(), base, inside=True)
        auditor = Auditor(module, density, torch.float32)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        digests = []
        for step in range(4):
            auditor.begin()
            with module.no_sync():
                for part in (1, 2):
                    loss_of(compiled(batch(rank, 10 * step + part))).backward()
            loss_of(compiled(batch(rank, 10 * step))).backward()
            auditor.end()
            optimizer.step()
            optimizer.zero_grad()
            digests.append(digest(module.parameters()))
        auditor.finish()
        results["no_sync"] = digests, reasons(), sorted(dct_compile.state_dict(module))

    with fresh_compiler():
        calls = []

        def own_hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            calls.append(bucket.index())
            return dist.all_reduce(bucket.buffer().div_(world_size), async_op=True).get_future().then(lambda done: done.value()[0])

        module, compiled = ddp_of(Net(), base, inside=False)
        module.register_comm_hook(None, own_hook)
        digests = train(module, compiled, rank, range(3))
        results["own hook"] = digests, reasons(), sorted(dct_compile.state_dict(module))
        assert calls

    with fresh_compiler():
        model = Net()
        model.bottom = DistributedDataParallel(Part(model.bottom))
        model.middle = DistributedDataParallel(Part(model.middle))
        rest = [*model.top.parameters(), *model.side.parameters()]
        for parameter in rest:
            parameter.requires_grad_(False)
        compiled = torch.compile(model, backend=dct, options=base)
        digests = train(model, compiled, rank, range(4))
        results["submodules"] = digests, reasons(), sorted(dct_compile.state_dict(model))
    return results


@pytest.mark.distributed
def test_ddp_in_its_many_ways() -> None:
    first, second = run_ranks(scenarios, 2)
    weights = ["bottom.weight", "middle.weight", "side.weight", "top.weight"]
    parts = ["bottom.linear.weight", "middle.linear.weight"]
    for name, (digests, decisions, state) in first.items():
        assert digests == second[name][0], f"{name}: the ranks' parameters differ"
        if name != "own hook":
            assert {decision for decision, _ in decisions} == {"compressed"}, (name, decisions)
        expected = {
            "frozen": [w for w in weights if w != "middle.weight"],
            "exempt": weights[:2],
            "own hook": [],
            "submodules": parts,
        }
        assert state == expected.get(name, weights), name
    for scheme in ("gather", "owner"):
        same = {tuple(first[f"{scheme} {how}"][0]) for how in ("around", "inside", "buckets")}
        assert len(same) == 1, f"{scheme}: neither the order of wrapping nor the buckets change what a parameter sends"
    assert first["views"][0] == first["static"][0] == first["gather inside"][0]
    for name in ("gather buckets", "owner buckets", "graph split at buckets"):
        assert len(first[name][1]) > 1, f"{name}: there was only one bucket"
    assert "DDP has a communication hook of its own" in [reason for _, reason in first["own hook"][1]]


def unused_at_times(rank: int, world_size: int) -> None:
    for scheme in ("gather", "owner"):
        with fresh_compiler():
            module, compiled = ddp_of(Net(), {"dp_density": 0.05, "all_reduce": scheme}, inside=True, find_unused_parameters=True)
            auditor = Auditor(module, 0.05, torch.bfloat16)
            train(module, compiled, rank, range(6), auditor, arguments=lambda step: (step % 2 == 0,))
            auditor.finish()


@pytest.mark.distributed
def test_a_step_in_which_no_rank_uses_a_parameter_loses_none_of_its_residual() -> None:
    """DDP throws the result of such a step away: what was sent then would be lost."""
    run_ranks(unused_at_times, 2)


class Hybrid(nn.Module):
    """Replicated parameters and sharded ones: each model-parallel rank has other experts."""

    def __init__(self, mp_rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(16, 32)
        torch.manual_seed(1 + mp_rank)
        self.expert = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(torch.relu(self.shared(x)))


def stacked(rank: int, world_size: int) -> dict[str, Any]:
    mp_rank = rank % 2
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = Hybrid(mp_rank)
    experts, others = (["expert.weight", "expert.bias"], ["shared.weight", "shared.bias"])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    inner = DistributedDataParallel(model, process_group=groups[mp_rank])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, [f"module.{name}" for name in experts])
    outer = DistributedDataParallel(inner)
    compiled = torch.compile(outer, backend=dct, options={"dp_density": 0.05, "all_reduce": "owner"})
    watched = Auditor(model.shared, 0.05, torch.bfloat16), Auditor(model.expert, 0.05, torch.bfloat16, groups[mp_rank])
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.5)
    digests = []
    for step in range(4):
        for auditor in watched:
            auditor.begin()
        loss_of(compiled(batch(rank, step))).backward()
        for auditor in watched:
            auditor.end()
        optimizer.step()
        optimizer.zero_grad()
        digests.append((digest(model.shared.parameters()), digest(model.expert.parameters())))
    for auditor in watched:
        auditor.finish()
    sites = [(site.group_size, site.name, site.decision) for site in dct_compile.report().sites if site.kind == "gradient"]
    return {"digests": digests, "state": sorted(dct_compile.state_dict(outer)), "sites": sites}


@pytest.mark.distributed
def test_stacked_ddps_average_over_two_groups() -> None:
    results = run_ranks(stacked, 4)
    for rank, result in enumerate(results):
        assert [shared for shared, _ in result["digests"]] == [shared for shared, _ in results[0]["digests"]]
        assert result["digests"] == results[(rank + 2) % 4]["digests"]
        assert result["state"] == ["expert.weight", "shared.weight"]
        assert {(size, decision) for size, _, decision in result["sites"]} == {(4, "compressed"), (2, "compressed")}
    assert results[0]["digests"][-1][1] != results[1]["digests"][-1][1]
