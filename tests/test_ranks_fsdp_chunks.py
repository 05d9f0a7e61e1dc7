"""A head that is called piece by piece behind the forward, as a chunked loss does, and that shares a parameter group with the norm."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import dct_compile
from dct_compile.backend import dct
from dct_compile.report import SiteReport
from tests.rank_pool import Ranks
from tests.ranks_fsdp import OPTIONS, Block, Options, batch, gradients, is_same_everywhere

pytestmark = pytest.mark.distributed
CHUNKS = 2
EXACT: Options = {"parameter_codec": "dense", "sharded_gradients": "dense", "dp_value_dtype": "float32", "dp_density": 0.05}


class Headed(nn.Module):
    """Its forward leaves out the head, which ``loss`` calls once for each chunk of the rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(64) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, x: Tensor, criterion: Any) -> Tensor:
        return sum((criterion(self.head(part)) for part in self(x).chunk(CHUNKS)), torch.zeros(()))


def squared(output: Tensor) -> Tensor:
    return (output - torch.arange(32)).square().mean()


def compiled_and_sharded(mesh: DeviceMesh, options: Options) -> tuple[Headed, Any]:
    """Returns the model, whose blocks are compiled one by one, and the loss, which is compiled as well."""
    model = Headed()
    for block in model.blocks:
        block.compile(backend=dct, options=options)
        fully_shard(block, mesh=mesh)
    fully_shard([model.norm, model.head], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.compile(squared, backend=dct, options=options)


def trained(rank: int, world_size: int, options: str) -> tuple[dict[str, Tensor], bool, tuple[SiteReport, ...]]:
    """Returns the gradients of the second step, whether they are the same on all ranks, and the rows of the report."""
    model, criterion = compiled_and_sharded(init_device_mesh("cpu", (world_size,)), OPTIONS[options] or {})
    for _ in range(2):
        model.zero_grad()
        model.loss(batch(rank, 0), criterion).backward()
    found = gradients(model)
    return found, is_same_everywhere(found), dct_compile.report().sites


def test_gradients_are_those_of_dense_collectives(ranks2: Ranks) -> None:
    dense, found = (ranks2(trained, options) for options in ("dense", "gradients"))
    assert found[0][1]
    for name, value in dense[0][0].items():
        allowed = 1.5 * CHUNKS * float(value.abs().max()) / 127
        torch.testing.assert_close(found[0][0][name], value, rtol=0, atol=allowed, msg=lambda text, name=name: f"{name}: {text}")
        assert value.dim() == 1 or not torch.equal(found[0][0][name], value), name


def test_each_parameter_group_is_in_the_report_once(ranks3: Ranks) -> None:
    for _, _, sites in ranks3(trained, "default"):
        assert {site.decision for site in sites} == {"compressed"}
        rows = [(site.kind, site.name.partition(",")[0]) for site in sites]
        for first in ("norm.weight", "blocks.0.norm.weight", "blocks.1.norm.weight"):
            assert rows.count(("parameter", first)) == 2, "for the forward and for the backward"
            assert rows.count(("sharded_gradient", first)) == 1
        assert len(rows) == 9


def applied_and_held(rank: int, world_size: int, is_mean: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the sum of what four steps have applied and still hold back, and the sum of their gradients; both over two copies.

    ``is_mean``: FSDP divides by the number of copies. Else it adds up.
    """
    sums = []
    for options in ({**EXACT, "dp_density": 1.0}, EXACT):
        torch._dynamo.reset()
        model, criterion = compiled_and_sharded(init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("copies", "shards")), options)
        for module in model.modules():
            if isinstance(module, FSDPModule) and not is_mean:
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        total: dict[str, Tensor] = {}
        for step in range(4):
            model.loss(batch(rank, step), criterion).backward()
            total = {name: value + total.get(name, 0) for name, value in gradients(model).items()}
            optimizer.step()
            optimizer.zero_grad()
        sums.append(total)
    for name, entry in dct_compile.state_dict(model).items():
        residual = entry["residual"].clone()
        dist.all_reduce(residual, dist.ReduceOp.AVG if is_mean else dist.ReduceOp.SUM)
        assert residual.count_nonzero(), name
        sums[1][name] += residual.view_as(sums[1][name])
    return sums[1], sums[0]


@pytest.mark.parametrize("is_mean", [True, False], ids=["mean", "sum"])
def test_nothing_is_lost_between_the_chunks_of_two_copies(ranks2: Ranks, is_mean: bool) -> None:
    for found, expected in ranks2(applied_and_held, is_mean):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
