"""Activations as quantised rows and sums over gloo ranks: values, run-time sizes, and all the collectives of a tensor-parallel layer."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.small_models import all_reduce

pytestmark = pytest.mark.distributed

BATCHES = [(4, 5), (7, 3), (2, 9)]


class Sizes(NamedTuple):
    """``errors``: largest error over the largest magnitude, of results and gradients. ``sums``: as the rank has got them."""

    errors: list[float]
    sums: list[Tensor]
    decisions: set[str]


def summed(rank: int, world_size: int) -> Sizes:
    def total(x: Tensor) -> Tensor:
        return all_reduce(x.tanh()).sin()

    compiled = torch.compile(total, backend=dct)
    errors, sums = [], []
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randn(*batch, 64, generator=generator, requires_grad=True)
        again = x.detach().clone().requires_grad_()
        found, exact = compiled(x), total(again)
        found.sum().backward()
        exact.sum().backward()
        errors += [_error(found, exact), _error(x.grad, again.grad)]
        sums.append(found.detach())
    return Sizes(errors, sums, {site.decision for site in dct_compile.report().sites})


def _error(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("pool", ["ranks2", "ranks3"])
def test_sums_of_changing_batches(pool: str, request: pytest.FixtureRequest) -> None:
    results = request.getfixturevalue(pool)(summed)
    for result in results:
        assert all(0 < error < 0.1 for error in result.errors)
        assert result.decisions == {"compressed"}
        assert all(torch.equal(own, first) for own, first in zip(result.sums, results[0].sums, strict=True))


def dispatched(rank: int, world_size: int) -> list[float]:
    """Sends rows of two dimensions to other ranks, by splits that only the data know, and back."""

    def there_and_back(x: Tensor, received: Tensor, sent: Tensor) -> Tensor:
        sizes = received.tolist(), sent.tolist()
        for size in (*sizes[0], *sizes[1]):
            torch._check(size >= 0)
            torch._check(size <= 100)
        arrived = funcol.all_to_all_single_autograd(x.tanh(), *sizes, dist.group.WORLD)
        return funcol.all_to_all_single_autograd(arrived.sin() + 1, sizes[1], sizes[0], dist.group.WORLD).cos()

    tables = [[[2, 3], [1, 4]], [[0, 5], [2, 2]], [[3, 1], [0, 6]]]
    compiled = torch.compile(there_and_back, backend=dct, fullgraph=True)
    errors = []
    for table in tables:
        received, sent = torch.tensor([row[rank] for row in table]), torch.tensor(table[rank])
        x = torch.randn(int(sent.sum()), 3, 16, requires_grad=True)
        again = x.detach().clone().requires_grad_()
        found, exact = compiled(x, received, sent), there_and_back(again, received, sent)
        found.square().sum().backward()
        exact.square().sum().backward()
        errors += [_error(found, exact), _error(x.grad, again.grad)]
    assert {site.decision for site in dct_compile.report().sites} == {"compressed"}
    return errors


def test_run_time_splits_of_rows_of_several_dimensions(ranks2: Ranks) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for errors in ranks2(dispatched):
            assert all(0 < error < 0.1 for error in errors)


class Block(nn.Module):
    """A transformer's feed-forward block with its norm, and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return h


class Trained(NamedTuple):
    """``losses`` of each step, compiled and eager. ``ratio``: bytes dense by bytes on the wire."""

    losses: tuple[list[float], list[float]]
    ratio: float
    dense_sites: list[str]


def tensor_parallel(rank: int, world_size: int, sequence: bool) -> Trained:
    mesh = init_device_mesh("cpu", (world_size,))
    losses: list[list[float]] = []
    for backend in (dct, "eager"):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block(), nn.LayerNorm(64), nn.Linear(64, 8))
        layout = Shard(1) if sequence else Replicate()
        for block in model[:2]:
            plan = {
                "up": ColwiseParallel(input_layouts=layout),
                "down": RowwiseParallel(output_layouts=layout),
                **({"norm": SequenceParallel()} if sequence else {}),
            }
            parallelize_module(block, mesh, plan)
        if sequence:
            parallelize_module(
                model[0], mesh, PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True)
            )
            gathers = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)
            parallelize_module(model[2], mesh, gathers)
        compiled = torch.compile(model, backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for _ in range(30):
            x = torch.randn(8, 12, 64, generator=generator)
            loss = nn.functional.cross_entropy(compiled(x).flatten(0, 1), x.cumsum(2).argmax(2).flatten() % 8)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    sites = [site for site in dct_compile.report().sites if site.calls]
    dense, sent = (sum(getattr(site, name) * site.calls for site in sites) for name in ("dense_bytes", "wire_bytes"))
    left = [f"{site.kind} {site.shape}: {site.reason}" for site in sites if site.decision == "dense"]
    return Trained((losses[0], losses[1]), dense / sent, left)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_layers_as_a_whole(ranks2: Ranks, sequence: bool) -> None:
    for result in ranks2(tensor_parallel, sequence):
        assert result.ratio > 3.5, result.dense_sites
        compiled, eager = result.losses
        assert compiled[-1] < 0.9 * compiled[0]
        assert abs(compiled[-1] - eager[-1]) < 0.03 * eager[-1]
