"""Hybrid sharding: the average of shards over their copies travels by the gradient schemes, with a residual of the shard's size."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from dct_compile.optim import LAST
from dct_compile.reasons import Reason
from tests.rank_pool import Ranks
from tests.ranks_fsdp import Net, batch, gradients, is_same_everywhere, loss_of, parameters, sharded

pytestmark = pytest.mark.distributed
EXACT: dict[str, Any] = {"parameter_codec": "dense", "sharded_gradients": "dense"}
OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda held: torch.optim.SGD(held, lr=0.002, momentum=0.9),
    "AdamW": lambda held: torch.optim.AdamW(held, lr=0.01, betas=(0.9, 0.95)),
}


def mesh_of(world_size: int, shards: int) -> Any:
    return init_device_mesh("cpu", (world_size // shards, shards), mesh_dim_names=("copies", "shards"))


def train(model: nn.Module, options: dict[str, Any], rank: int, optimizer: str, steps: range = range(8)) -> torch.optim.Optimizer:
    compiled: Any = torch.compile(model, backend=dct, options=options)
    made: torch.optim.Optimizer = OPTIMIZERS[optimizer]([item for item in model.parameters() if item.requires_grad])
    for step in steps:
        loss_of(compiled(batch(rank, step))).backward()
        made.step()
        made.zero_grad()
    return made


def beside_ddp(rank: int, world_size: int, scheme: str, optimizer: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters of a model whose shards are whole, and those of the same model under DDP."""
    # FSDP attaches in a forward; DDP compresses the first gradient as well.
    options = {**EXACT, "gradient_scheme": scheme, "dp_density": 0.05, "exempt": ["frozen"]}
    model, plain = sharded(mesh_of(world_size, 1)), Net()
    train(model, options, rank, optimizer)
    train(DistributedDataParallel(plain), options, rank, optimizer)
    return parameters(model), {name: item.detach() for name, item in plain.named_parameters()}


@pytest.mark.parametrize(("scheme", "optimizer"), [("gather", "AdamW"), ("owner", "SGD")])
def test_copies_are_averaged_as_under_ddp(ranks2: Ranks, scheme: str, optimizer: str) -> None:
    for found, expected in ranks2(beside_ddp, scheme, optimizer):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def on_four(rank: int, world_size: int) -> tuple[Any, ...]:
    mesh = mesh_of(world_size, 2)
    model = sharded(mesh)
    train(model, {"dp_density": 0.02}, rank, "AdamW", range(12))
    report = dct_compile.report()
    state = dct_compile.state_dict(model)
    sizes = {name: (entry["residual"].numel(), held(dict(model.named_parameters())[name])) for name, entry in state.items()}
    return is_same_everywhere(parameters(model)), report.sites, sizes, report.notes


def held(parameter: Tensor) -> int:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().numel()


def test_two_copies_of_two_shards(ranks4: Ranks) -> None:
    for same, sites, sizes, notes in ranks4(on_four):
        assert same
        averaged = [site for site in sites if site.kind == "gradient"]
        assert [site.collective for site in averaged] == ["all_reduce"] * 3
        assert all(site.group_size == 2 and site.decision == "compressed" and site.stepped == "bypass + gaps" for site in averaged)
        assert sum(site.dense_bytes for site in averaged) > 5 * sum(site.wire_bytes for site in averaged)
        assert sizes
        assert all(residual == numel for residual, numel in sizes.values())
        assert not [note for note in notes if note.startswith("not seen")]


def resumed(rank: int, world_size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters after a training, and after one that was saved and loaded in its middle."""
    results = []
    for interrupted in (False, True):
        torch._dynamo.reset()
        model = sharded(mesh_of(world_size, 1))
        options = {**EXACT, "dp_density": 0.05}
        train(model, options, rank, "SGD", range(6))
        if interrupted:
            saved = copy.deepcopy(dct_compile.state_dict(model))
            values = {name: item.to_local().clone() for name, item in model.named_parameters()}  # type: ignore[attr-defined]
            model = sharded(mesh_of(world_size, 1))
            with torch.no_grad():
                for name, item in model.named_parameters():
                    item.to_local().copy_(values[name])  # type: ignore[attr-defined]
            dct_compile.load_state_dict(model, saved)
        train(model, options, rank, "SGD", range(6, 10))
        results.append(parameters(model))
    return results[0], results[1]


def test_a_loaded_state_goes_on(ranks2: Ranks) -> None:
    for found, again in ranks2(resumed):
        assert all(torch.equal(again[name], value) for name, value in found.items())


def accumulated(rank: int, world_size: int, factor: float | None) -> dict[str, Tensor]:
    """Returns the gradients of two backwards, of which the second one averages, in the dense phase of a training."""
    model = sharded(mesh_of(world_size, 1))
    compiled: Any = torch.compile(model, backend=dct, options={**EXACT, "start_iter": 9})
    for module in (model, *model.blocks):
        if factor is not None:
            module.set_gradient_divide_factor(factor)
    for step in range(2):
        model.set_requires_all_reduce(step == 1)
        loss_of(compiled(batch(rank, step))).backward()
    return gradients(model)


@pytest.mark.parametrize("factor", [None, 4.0])
def test_gradients_accumulate_before_the_average(ranks2: Ranks, factor: float | None) -> None:
    plain = Net()
    (sum(loss_of(plain(batch(rank, step))) for rank in range(2) for step in range(2)) / (factor or 2.0)).backward()  # type: ignore[union-attr]
    for found in ranks2(accumulated, factor):
        for name, item in plain.named_parameters():
            if item.grad is not None:
                torch.testing.assert_close(found[name], item.grad, rtol=1e-4, atol=1e-5)


def hooked(rank: int, world_size: int) -> set[str]:
    model = sharded(mesh_of(world_size, 1))
    for module in (model, *model.blocks):
        module.set_all_reduce_hook(lambda shards: None)
    train(model, {}, rank, "SGD", range(2))
    return {site.reason for site in dct_compile.report().sites}


def test_a_hook_of_the_user_stays(ranks2: Ranks) -> None:
    assert ranks2(hooked) == [{Reason.OWN_HOOK_OF_FSDP}] * 2


def phased(rank: int, world_size: int) -> list[str]:
    model = sharded(mesh_of(world_size, 1))
    compiled: Any = torch.compile(model, backend=dct, options={**EXACT, "start_iter": 2})
    reasons = []
    for step in range(4):
        loss_of(compiled(batch(rank, step))).backward()
        reasons.append(next(site.decision for site in dct_compile.report().sites if site.kind == "gradient"))
    return reasons


def test_the_first_exchanges_are_dense_with_start_iter(ranks2: Ranks) -> None:
    assert ranks2(phased) == [["dense", "dense", "compressed", "compressed"]] * 2


def optimizer_through_a_checkpoint(rank: int, world_size: int, folder: str) -> list[tuple[Tensor, Tensor]]:
    """Returns the steps of the last arrivals on this rank, before the optimizer was saved and after it was loaded by a new run."""
    options = {"dp_density": 0.02, "second_moment": "gaps"}
    before = sharded(mesh_of(world_size, 2))
    optimizer = train(before, options, rank, "AdamW", range(6))
    checkpoint.save({"optimizer": get_optimizer_state_dict(before, optimizer)}, checkpoint_id=folder)
    model = sharded(mesh_of(world_size, 2))
    fresh = train(model, options, rank, "AdamW", range(4))  # its state is there, with other values
    loaded = {"optimizer": get_optimizer_state_dict(model, fresh)}
    checkpoint.load(loaded, checkpoint_id=folder)
    set_optimizer_state_dict(model, fresh, loaded["optimizer"])
    pairs = zip(before.named_parameters(), model.parameters(), strict=True)
    return [(local(optimizer, old), local(fresh, new)) for (_, old), new in pairs if LAST in optimizer.state[old]]


def local(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    steps = optimizer.state[parameter][LAST]
    assert isinstance(steps, DTensor)
    assert steps.shape == (*parameter.shape, 4)
    return steps.to_local().to(torch.uint8).view(torch.int32)  # torch casts what it loads to the dtype of the parameter


def test_last_arrivals_are_sharded_in_a_checkpoint(ranks4: Ranks, tmp_path: Path) -> None:
    results = ranks4(optimizer_through_a_checkpoint, str(tmp_path))
    for pairs in results:
        assert pairs
        for saved, loaded in pairs:
            assert torch.equal(saved, loaded)
    assert any(not torch.equal(one, other) for (one, _), (other, _) in zip(results[0], results[1], strict=True))
