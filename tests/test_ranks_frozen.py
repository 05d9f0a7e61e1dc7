"""Finetuning under ``fully_shard``: layers that are frozen, and layers that are frozen or trained only later."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks_fsdp import gradients
from tests.ranks_frozen import EXACT, WIDTH, Two, input_of, rows, two_sharded

pytestmark = pytest.mark.distributed
COPIES: dict[str, Any] = {**EXACT, "dp_density": 0.05}


def mesh_of(world_size: int, shards: int) -> Any:
    return init_device_mesh("cpu", (world_size // shards, shards), mesh_dim_names=("copies", "shards"))


def sent_and_held(model: Two, sent: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the sums of the gradients ``sent`` and of the mean of all residuals: what was given to compression so far."""
    sums = dict(sent)
    for name, entry in dct_compile.state_dict(model).items():
        residual = entry["residual"].clone()
        dist.all_reduce(residual, dist.ReduceOp.AVG)
        sums[name] = sums.get(name, 0) + residual.view(WIDTH, WIDTH)
    return sums


def backward(compiled: Any, rank: int, step: int) -> None:
    compiled(input_of(rank, step)).square().mean().backward()


def mean_gradients(world_size: int, trained: str) -> dict[str, Tensor]:
    """Returns the mean over the ranks of the gradients of the first step, without any wrapper."""
    model = Two()
    for rank in range(world_size):
        (model(input_of(rank, 0)).square().mean() / world_size).backward()
    return {name: item.grad for name, item in model.named_parameters() if name.startswith(trained) and item.grad is not None}


def finetuned(rank: int, world_size: int, trained: str) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    model = two_sharded(mesh_of(world_size, 1), trained)
    backward(torch.compile(model, backend=dct, options=COPIES), rank, 0)
    return sent_and_held(model, gradients(model)), [(site.name, site.decision) for site in rows("gradient")]


@pytest.mark.parametrize("trained", ["first", "second"])
def test_copies_of_a_model_with_a_frozen_layer_are_averaged(ranks2: Ranks, trained: str) -> None:
    expected = mean_gradients(2, trained)
    for found, sites in ranks2(finetuned, trained):
        assert sites == [(f"{trained}.linear.weight", "compressed")]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
