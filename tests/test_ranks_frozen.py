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
from tests.ranks_frozen import EXACT, WIDTH, Two, input_of, rows, train_only, two_sharded
from tests.ranks_fsdp import gradients

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


def mean_gradients(world_size: int, trained: tuple[str, ...], step: int) -> dict[str, Tensor]:
    """Returns the mean over the ranks of the gradients of the layers ``trained`` in one step, without any wrapper."""
    model = Two()
    for rank in range(world_size):
        (model(input_of(rank, step)).square().mean() / world_size).backward()
    return {name: item.grad for name, item in model.named_parameters() if name.startswith(trained) and item.grad is not None}


def finetuned(rank: int, world_size: int, trained: str) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    model = two_sharded(mesh_of(world_size, 1), trained)
    backward(torch.compile(model, backend=dct, options=COPIES), rank, 0)
    return sent_and_held(model, gradients(model)), [(site.name, site.decision) for site in rows("gradient")]


@pytest.mark.parametrize("trained", ["first", "second"])
def test_copies_of_a_model_with_a_frozen_layer_are_averaged(ranks2: Ranks, trained: str) -> None:
    expected = mean_gradients(2, (trained,), 0)
    for found, sites in ranks2(finetuned, trained):
        assert sites == [(f"{trained}.linear.weight", "compressed")]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


Stages = list[tuple[str, ...]]
"""The layers that are trained in each step."""


def exact_sums(world_size: int, stages: Stages) -> dict[str, Tensor]:
    """Returns the sums over the steps of the mean gradients of the layers that are trained, without any wrapper."""
    sums: dict[str, Tensor] = {}
    for step, layers in enumerate(stages):
        for name, value in mean_gradients(world_size, layers, step).items():
            sums[name] = sums.get(name, 0) + value
    return sums


def staged_copies(rank: int, world_size: int, stages: Stages, groups: int) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Returns what the steps have sent and still hold, and the names in the report after each step."""
    model = two_sharded(mesh_of(world_size, 1), *stages[0], groups=groups)
    compiled = torch.compile(model, backend=dct, options=COPIES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sent: dict[str, Tensor] = {}
    names = []
    for step, layers in enumerate(stages):
        train_only(model, *layers)
        backward(compiled, rank, step)
        for name, value in gradients(model).items():
            sent[name] = sent.get(name, 0) + value
        names.append([site.name for site in rows("gradient") if site.decision == "compressed"])
        optimizer.step()
        optimizer.zero_grad()
    return sent_and_held(model, sent), names


@pytest.mark.parametrize("groups", [1, 2])
def test_each_layer_keeps_its_residual_while_another_one_is_trained(ranks2: Ranks, groups: int) -> None:
    stages: Stages = [("first",), ("first",), ("second",), ("first",), ("first", "second")]
    expected = exact_sums(2, stages)
    first, second = "first.linear.weight", "second.linear.weight"
    for found, names in ranks2(staged_copies, stages, groups):
        assert names[:4] == [[first], [first], [second], [first]]
        assert sorted(", ".join(names[4]).split(", ")) == [first, second]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def staged_shards(rank: int, world_size: int, stages: Stages) -> list[tuple[dict[str, Tensor], list[str]]]:
    """Returns for each step the gradients, and the names of those that the report says are sent to their owners."""
    model = two_sharded(init_device_mesh("cpu", (world_size,)), *stages[0])
    compiled = torch.compile(model, backend=dct, options={"parameter_codec": "dense"})
    results = []
    for step, layers in enumerate(stages):
        train_only(model, *layers)
        model.zero_grad()
        backward(compiled, rank, step)
        results.append((gradients(model), sorted(site.name for site in rows("sharded_gradient") if site.decision == "compressed")))
    return results


def test_what_is_thawed_is_compressed_and_what_is_frozen_leaves_the_report(ranks2: Ranks) -> None:
    stages: Stages = [("second",), ("first", "second"), ("first",), ("second",)]
    for results in ranks2(staged_shards, stages):
        for step, (layers, (found, names)) in enumerate(zip(stages, results, strict=True)):
            assert names == [f"{layer}.linear.weight" for layer in layers]
            for name, value in mean_gradients(2, layers, step).items():
                assert not torch.equal(found[name], value), (step, name)
                torch.testing.assert_close(found[name], value, rtol=0, atol=float(value.abs().max()) / 100)


def uncompiled(rank: int, world_size: int) -> tuple[Tensor, bool]:
    """Returns the gradient of a layer that a forward without any compiled graph trains, and whether the other one kept its residual."""
    model = two_sharded(mesh_of(world_size, 1), "first", groups=1)
    backward(torch.compile(model, backend=dct, options=COPIES), rank, 0)
    before = dct_compile.state_dict(model)["first.linear.weight"]["residual"]
    train_only(model, "second")
    model.zero_grad()
    backward(model, rank, 1)
    state = dct_compile.state_dict(model)
    return gradients(model)["second.linear.weight"], state["first.linear.weight"]["residual"].equal(before) and len(state) == 1


def test_gradients_of_other_parameters_of_the_same_size_are_averaged_as_they_are(ranks2: Ranks) -> None:
    (expected,) = mean_gradients(2, ("second",), 1).values()
    for found, kept in ranks2(uncompiled):
        torch.testing.assert_close(found, expected)
        assert kept


def disagreeing(rank: int, world_size: int) -> list[str]:
    model = two_sharded(init_device_mesh("cpu", (world_size,)), "first", "second")
    compiled: Any = torch.compile(model, backend=dct, options={"parameter_codec": "int4" if rank else "int8"})
    errors = []
    for step in range(2):
        try:
            compiled(input_of(rank, step))
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_a_forward_after_a_failed_one_fails_as_well(ranks2: Ranks) -> None:
    for errors in ranks2(disagreeing):
        assert ["would compress differently" in error for error in errors] == [True, True]
