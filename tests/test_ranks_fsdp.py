"""Models under ``fully_shard``: parameters and gradients travel encoded, and every rank computes with the same values."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Reason
from dct_compile.runtime import RUNTIME
from tests.rank_pool import Ranks
from tests.ranks_fsdp import (
    OPTIONS,
    SHARDING,
    Net,
    batch,
    compiled_of,
    gathered_values,
    gradients,
    is_same_everywhere,
    loss_of,
    mean_gradients,
    parameters,
    sharded,
    trained,
)

pytestmark = pytest.mark.distributed
STEP = {"int8": 127, "int4": 7, "bfloat16": 256}
"""The largest code: no element moves by more than the largest one divided by it, times the rounding of the scale."""


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], levels: float, *, differs: bool = True) -> None:
    """Checks that each element is within one step of its code, and that something was rounded."""
    assert found.keys() == expected.keys()
    moved = False
    for name, value in expected.items():
        step = 1.01 * value.abs().max() / levels
        torch.testing.assert_close(found[name], value, rtol=0, atol=float(step) + 1e-7, msg=lambda text, name=name: f"{name}: {text}")
        moved = moved or not torch.equal(found[name], value)
    assert moved == differs


@pytest.mark.parametrize("codec", STEP)
def test_all_ranks_compute_with_the_same_rounded_parameters(ranks2: Ranks, codec: str) -> None:
    for rank, (found, exact) in enumerate(results := ranks2(gathered_values, codec)):
        assert_close(found, exact, STEP[codec])
        assert all(torch.equal(found[name], value) for name, value in results[0][0].items()), rank


@pytest.mark.parametrize("way", SHARDING)
def test_gradients_are_the_mean_within_a_step_of_their_codes(ranks2_once: Ranks, way: str) -> None:
    dense = ranks2_once(trained, way, "dense")[0].gradients
    for outcome in ranks2_once(trained, way, "gradients"):
        levels = 16 if way == "bfloat16 sums" else 100  # beside int8, what bfloat16 rounds
        assert_close(outcome.gradients, dense, levels)


def test_three_ranks_average_the_gradients_of_plain_pytorch(ranks3: Ranks) -> None:
    expected = mean_gradients(3)
    for outcome in ranks3(trained, "plain", "gradients"):
        assert_close(outcome.gradients, expected, 100)


@pytest.mark.parametrize("way", ["plain", "bfloat16"])
def test_dense_options_change_nothing(ranks2_once: Ranks, way: str) -> None:
    for plain, outcome in zip(ranks2_once(trained, way, "none"), ranks2_once(trained, way, "dense"), strict=True):
        assert outcome.losses == pytest.approx(plain.losses, rel=1e-3 if "bfloat16" in way else 1e-5)
        assert {site.decision for site in outcome.sites} == {"dense"}


def test_the_loss_follows_that_of_dense_training(ranks2: Ranks) -> None:
    dense, found = (ranks2(trained, "plain", options, 25, "Adam") for options in ("none", "default"))
    for plain, outcome in zip(dense, found, strict=True):
        assert outcome.losses[-1] < outcome.losses[0] / 2
        assert outcome.losses[-1] == pytest.approx(plain.losses[-1], rel=0.05)
        assert all(torch.equal(value, found[0].parameters[name]) for name, value in outcome.parameters.items())


def test_rows_of_the_report(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained, "plain", "default"):
        rows = [(site.collective, site.kind, site.decision, site.name.partition(".weight")[0]) for site in outcome.sites]
        inner = [
            row
            for block in ("blocks.0.norm", "blocks.1.norm")
            for row in (
                *[("all_gather_into_tensor", "parameter", "compressed", block)] * 2,
                ("reduce_scatter_tensor", "sharded_gradient", "compressed", block),
            )
        ]
        assert rows[2:] == inner
        assert [row[:3] for row in rows[:2]] == [inner[0][:3], inner[2][:3]]
        assert "frozen" in outcome.sites[0].name
        assert "frozen" not in outcome.sites[1].name
        assert all(3.5 < site.dense_bytes / site.wire_bytes < 4 for site in outcome.sites)
        assert "exact: blocks.0.norm.weight" in outcome.sites[2].reason
        assert outcome.notes == ()


def test_parameters_that_are_kept_are_gathered_once(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained, "kept", "dense"):
        assert [site.kind for site in outcome.sites] == ["parameter", "sharded_gradient"] * 3


def test_bfloat16_parameters_are_halved(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained, "bfloat16", "default"):
        assert {site.dtype for site in outcome.sites if site.kind == "parameter"} == {"bfloat16"}
        assert all(1.7 < site.dense_bytes / site.wire_bytes < 2 for site in outcome.sites if site.kind == "parameter")
        assert all(3.5 < site.dense_bytes / site.wire_bytes < 4 for site in outcome.sites if site.kind != "parameter")
    for outcome in ranks2_once(trained, "bfloat16", "parameters bfloat16"):
        reason = Reason.ALREADY_SMALL.format(dtype="bfloat16", codec="bfloat16")
        assert {site.reason for site in outcome.sites if site.kind == "parameter"} == {reason}


def accumulated(rank: int, world_size: int, options: str) -> dict[str, Tensor]:
    model = sharded(init_device_mesh("cpu", (world_size,)))
    compiled = compiled_of(model, options)
    for step in range(3):
        model.set_requires_gradient_sync(step == 2)
        loss_of(compiled(batch(rank, step))).backward()
    return gradients(model)


def test_accumulated_gradients_are_sent_once(ranks2: Ranks) -> None:
    dense, found = (ranks2(accumulated, options) for options in ("dense", "gradients"))
    assert_close(found[0], dense[0], 100)


def divided(rank: int, world_size: int, factor: float, how: str) -> dict[str, Tensor]:
    """Returns the gradients with a divide factor; ``how``: by the operation of the collective, or by sums alone."""
    model = sharded(init_device_mesh("cpu", (world_size,)))
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(factor)
        module.set_force_sum_reduction_for_comms(how == "sums")
    compiled = compiled_of(model, "gradients")
    with torch.no_grad():
        compiled(batch(rank, 0))
    loss_of(compiled(batch(rank, 0))).backward()
    return gradients(model)


@pytest.mark.parametrize(("factor", "how"), [(5.0, "operation"), (5.0, "sums")])
def test_a_divide_factor_is_kept(ranks2: Ranks, factor: float, how: str) -> None:
    expected = {name: value * 2 / factor for name, value in mean_gradients(2).items()}
    for found in ranks2(divided, factor, how):
        assert_close(found, expected, 100)


def not_finite(rank: int, world_size: int, value: float) -> bool:
    model = sharded(init_device_mesh("cpu", (world_size,)))
    compiled = compiled_of(model, "gradients")
    for step in range(2):
        model.zero_grad()
        x = batch(rank, 0)
        x[0, 0] = value if rank == 1 and step == 1 else 0.0
        loss_of(compiled(x)).backward()
    found = gradients(model)
    return all(not item.isfinite().all() for item in found.values())


def test_what_is_not_finite_stays_so_on_all_ranks(ranks2: Ranks) -> None:
    assert ranks2(not_finite, math.nan) == [True, True]


def left_alone(rank: int, world_size: int) -> tuple[set[str], bool]:
    RUNTIME.links.auto = "auto"
    return {site.reason for site in trained(rank, world_size, "plain", "default").sites}, isinstance(dist.group.WORLD, dist.ProcessGroup)


def test_ranks_of_one_machine_stay_dense(ranks2: Ranks) -> None:
    assert ranks2(left_alone) == [({Reason.ONE_MACHINE}, True)] * 2


def disagreeing(rank: int, world_size: int) -> str:
    try:
        trained(rank, world_size, "plain", "parameters int4" if rank else "parameters int8")
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_ranks_that_differ_are_an_error_on_all(ranks2: Ranks) -> None:
    for text in ranks2(disagreeing):
        assert "would compress differently" in text
        assert "'parameter_codec'" in text


def explained(rank: int, world_size: int) -> tuple[list[Any], list[Any]]:
    model = sharded(init_device_mesh("cpu", (world_size,)))
    report = dct_compile.explain(model, batch(rank, 0))
    compiled = compiled_of(model, "default")
    loss_of(compiled(batch(rank, 0))).backward()
    return [[(site.kind, site.name, site.wire_bytes, site.reason) for site in found.sites] for found in (report, dct_compile.report())]  # type: ignore[return-value]


def test_explain_says_what_will_be_done(ranks2: Ranks) -> None:
    for told, done in ranks2(explained):
        assert told == done
        assert len(told) == 8


def consistent(rank: int, world_size: int) -> bool:
    model = sharded(init_device_mesh("cpu", (world_size,)))
    compiled = compiled_of(model, "parameters int4")
    loss_of(compiled(batch(rank, 0))).backward()
    for module in (model, *model.blocks):
        module.unshard()
    used = {name: item.detach().clone() for name, item in model.named_parameters()}
    model.reshard()
    return is_same_everywhere(used) and parameters(model).keys() == used.keys()


def test_three_ranks_hold_the_same_values(ranks3: Ranks) -> None:
    assert ranks3(consistent) == [True] * 3


def compiled_blocks(rank: int, world_size: int, first: str) -> tuple[list[str], int, bool, tuple[str, ...]]:
    """Trains a model whose blocks are compiled one by one, before or after they are sharded, the second one with other options."""
    model, mesh = Net(), init_device_mesh("cpu", (world_size,))
    for number, block in enumerate(model.blocks):
        options = {**(OPTIONS["gradients"] or {}), "sharded_gradients": "dense" if number else "int8"}
        if first == "compile":
            block.compile(backend=dct, options=options)
        fully_shard(block, mesh=mesh)
        if first == "shard":
            block.compile(backend=dct, options=options)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        loss_of(model(batch(rank, 0))).backward()
    report = dct_compile.report()
    names = [site.name.partition(",")[0] for site in report.sites if site.decision == "compressed"]
    return names, len(report.sites), is_same_everywhere(gradients(model)), report.notes


@pytest.mark.parametrize("first", ["compile", "shard"])
def test_blocks_may_be_compiled_one_by_one(ranks2: Ranks, first: str) -> None:
    for names, count, same, (note,) in ranks2(compiled_blocks, first):
        assert names == ["head.weight", "blocks.0.norm.weight", "blocks.1.norm.weight"]
        assert count == 8
        assert same
        assert note.endswith("option 'sharded_gradients' is 'int8' there and 'dense' in another graph")
