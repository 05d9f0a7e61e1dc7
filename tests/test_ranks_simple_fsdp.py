"""SimpleFSDP: the graph gathers parameters and reduces their gradients, both in blocks of integers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Reason
from dct_compile.report import SiteReport
from tests.rank_pool import Ranks
from tests.ranks_fsdp import OPTIONS, Block, Net, batch, gradients, parameters
from tests.ranks_simple_fsdp import simple_fsdp

pytestmark = pytest.mark.distributed
Result = tuple[dict[str, Tensor], dict[str, Tensor], list[float], tuple[SiteReport, ...]]


def plain_name(name: str) -> str:
    return name.replace("parametrizations.", "").removesuffix(".original")


def loss_of(output: Tensor) -> Tensor:
    return (output.float() - 1).square().mean()


def trained(rank: int, world_size: int, options: str, steps: int = 1, cast: bool = False, uneven: bool = False) -> Result:
    """Returns the gradients of the first step, the parameters at the end, the losses and the sites."""
    dtype = torch.bfloat16 if cast else torch.float32
    model = simple_fsdp(made(uneven), init_device_mesh("cpu", (world_size,)), dtype)
    compiled: Any = torch.compile(model, backend=dct, options=OPTIONS[options])
    optimizer, first, losses = torch.optim.Adam(model.parameters(), lr=0.01), {}, []
    for step in range(steps):
        loss = loss_of(compiled(batch(rank, step).to(dtype)))
        loss.backward()
        losses.append(float(loss))
        first = first or {plain_name(name): item for name, item in gradients(model).items()}
        optimizer.step()
        optimizer.zero_grad()
    found = {plain_name(name): item for name, item in parameters(model).items()}
    return first, found, losses, dct_compile.report().sites


def made(uneven: bool) -> nn.Module:
    """Returns a block, whose shards are even on two ranks, or a model with more rows than that."""
    torch.manual_seed(0)
    return Net() if uneven else Block(64)


def expected(world_size: int, uneven: bool = False) -> dict[str, Tensor]:
    """Returns the mean of the gradients of all ranks in plain PyTorch."""
    model = made(uneven)
    for rank in range(world_size):
        (loss_of(model(batch(rank, 0))) / world_size).backward()
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Checks gradients of rounded parameters: where a ReLU turns over, single elements are far off."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) < 0.05 * float(value.norm()), name


def test_gradients_are_those_of_plain_pytorch(ranks2_once: Ranks) -> None:
    for first, _, _, sites in ranks2_once(trained, "default", 25):
        assert_close(first, expected(2))
        assert {site.kind for site in sites} == {"parameter", "sharded_gradient"}
        assert {site.decision for site in sites if site.name.startswith("up.parametrizations.weight")} == {"compressed"}
        assert sum(site.dense_bytes for site in sites) > 3.7 * sum(site.wire_bytes for site in sites)


def test_uneven_shards_stay_dense_on_all_ranks(ranks3: Ranks) -> None:
    for first, _, _, sites in ranks3(trained, "default", 1, False, True):
        assert_close(first, expected(3, uneven=True))
        assert {site.kind for site in sites} == {"parameter", "sharded_gradient"}
        assert {site.reason for site in sites if site.kind == "parameter"} == {Reason.UNEVEN}


def test_the_loss_follows_that_of_dense_training(ranks2_once: Ranks) -> None:
    for (_, _, dense, sites), (_, _, found, _) in zip(ranks2_once(trained, "dense", 25), ranks2_once(trained, "default", 25), strict=True):
        assert found[-1] < found[0] / 2
        assert found[-1] == pytest.approx(dense[-1], rel=0.05)
        reasons = {site.reason for site in sites}
        assert reasons == {Reason.PARAMETER_DENSE, Reason.DENSE_FORWARD.format(reason=Reason.PARAMETER_DENSE)}


def test_parameters_alone_may_be_rounded(ranks2: Ranks) -> None:
    for first, _, _, sites in ranks2(trained, "parameters bfloat16"):
        assert_close(first, expected(2))
        assert {site.reason for site in sites if site.kind == "parameter" and site.decision == "compressed"} == {Reason.ROUNDED}
        compressed = [site for site in sites if site.kind == "sharded_gradient" and site.decision == "compressed"]
        assert compressed
        assert all((site.wire_bytes, site.reason) == (site.dense_bytes, Reason.SHARDED_DENSE) for site in compressed)


def test_parameters_that_are_cast_before_they_are_gathered(ranks2: Ranks) -> None:
    for first, _, _, sites in ranks2(trained, "default", 1, True):
        assert_close(first, expected(2))
        gathered = [site for site in sites if site.kind == "parameter" and site.decision == "compressed"]
        assert gathered
        assert all(site.dtype == "bfloat16" and site.dense_bytes > 1.9 * site.wire_bytes for site in gathered)
