"""DistributedDataParallel over gloo ranks: wrapping orders, buckets, accumulation, unused and frozen parameters, hooks."""

import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from dct_compile.integrations.ddp import BucketReducer, GradientCompressor
from tests.ranks import digest, fresh_compiler, run_ranks
from tests.ranks_audit import Auditor
from tests.ranks_ddp import Net, Options, batch, ddp_of, loss_of, reasons, train

SMALL_BUCKETS = 0.004
"""MB: a bucket for nearly every layer of ``Net``. Dynamo's own splitting at buckets must be off for less than 1 MB."""


class Part(nn.Module):
    """A part of a model with code of its own: Dynamo compiles no frame of torch's, such as that of a bare linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


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


def overlapping(rank: int, world_size: int) -> tuple[int, bool]:
    """Buckets reduced, and whether the first waited in vain for the last to be filled."""
    last_filled, starved, reduced = threading.Event(), threading.Event(), []
    reduce, reducer_of, filled = BucketReducer.__call__, GradientCompressor._reducer, []

    def wait_for_the_last(self: BucketReducer, buffer: Tensor) -> Tensor:
        if not last_filled.wait(20):
            starved.set()
        reduced.append(self)
        return reduce(self, buffer)

    def tell(self: GradientCompressor, index: int, parameters: Sequence[Tensor], buffer: Tensor) -> BucketReducer:
        filled.extend(parameters)
        if len(filled) == len(self.names):
            last_filled.set()
        return reducer_of(self, index, parameters, buffer)

    with torch._dynamo.config.patch(optimize_ddp=False):
        _, compiled = ddp_of(Net(), {}, inside=True, bucket_cap_mb=SMALL_BUCKETS)
        loss_of(compiled(batch(rank, 0))).backward()  # DDP makes its small buckets after the first step
        with mock.patch.object(BucketReducer, "__call__", wait_for_the_last), mock.patch.object(GradientCompressor, "_reducer", tell):
            loss_of(compiled(batch(rank, 1))).backward()
    return len(reduced), starved.is_set()


@pytest.mark.distributed
def test_a_bucket_does_not_block_the_backward_that_fills_the_next() -> None:
    for buckets, starved in run_ranks(overlapping, 2):
        assert buckets > 1
        assert not starved
