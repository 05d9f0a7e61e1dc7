"""Option ``data_parallel`` on models that are sharded over ranks: only copies are made equal and averaged."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Note, Unseen
from dct_compile.report import GRADIENTS_OUTSIDE
from tests import ranks_sharded
from tests.rank_pool import Ranks
from tests.ranks import fresh_compiler
from tests.ranks_sharded import MODELS, Localised, trained
from tests.tracing import fake_group

AVERAGED: dict[str, Any] = {"data_parallel": True}
SHARDS = "up.weight, up.bias, down.weight"
ALL = ("up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight", "down.bias")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor parallel", "fsdp"])
def test_a_forward_changes_no_parameter(ranks2_once: Ranks, name: str) -> None:
    for outcome in ranks2_once(trained, name, True, True):
        assert_same(outcome.forward, outcome.before, rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor parallel", "sequence parallel", "fsdp", "replicated"])
def test_training_is_what_it_is_without_the_option(ranks2_once: Ranks, name: str) -> None:
    same = name.endswith(" parallel")
    alone, averaged = (ranks2_once(trained, name, averaged, same) for averaged in (False, True))
    for expected, found in zip(alone, averaged, strict=True):
        assert_same(found.after, expected.after)
        assert any(not torch.equal(found.after[key], found.before[key]) for key in found.after)


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "note"), [("tensor parallel", Note.SHARDED.format(parameters=SHARDS)), ("fsdp", Note.REDUCED_BY_FSDP)])
def test_what_is_left_alone_is_told(ranks2_once: Ranks, name: str, note: str) -> None:
    outside = {Note.UNSEEN.format(what=Unseen.DTENSOR)} if name == "tensor parallel" else set()
    for outcome in ranks2_once(trained, name, True, name == "tensor parallel"):
        (told,) = set(outcome.notes) - outside
        assert outside <= set(outcome.notes)
        assert told.startswith(note.partition(":")[0])
        assert set(told.rpartition(": ")[2].split(", ")) == set(SHARDS.split(", ") if name == "tensor parallel" else ALL)


@pytest.mark.distributed
def test_only_copies_of_a_tensor_parallel_model_are_averaged(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained, "tensor parallel", True, True):
        assert ("gradient", "down.bias, norm.bias, norm.weight") in outcome.sites


@pytest.mark.distributed
def test_fsdp_reduces_alone(ranks2_once: Ranks) -> None:
    for outcome in ranks2_once(trained, "fsdp", True, False):
        assert [kind for kind, _ in outcome.sites] == ["parameter", "sharded_gradient"]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "summed"), [("replicated", set(ALL)), ("sequence parallel", {"norm.weight", "norm.bias"})])
def test_what_dtensor_sums_is_not_averaged(ranks2_once: Ranks, name: str, summed: set[str]) -> None:
    for outcome in ranks2_once(trained, name, True, name == "sequence parallel"):
        (note,) = (note for note in outcome.notes if note.startswith(Note.REDUCED_BY_DTENSOR.partition(":")[0]))
        assert set(note.rpartition(": ")[2].split(", ")) == summed
        assert not summed & {name for kind, names in outcome.sites if kind == "gradient" for name in names.split(", ")}


@pytest.mark.distributed
def test_copies_as_dtensors_are_made_equal_and_averaged(ranks2_once: Ranks) -> None:
    first, second = ranks2_once(trained, "localised", True, False)
    assert_same(second.after, first.after, rtol=0, atol=0)
    reference = Localised.__new__(Localised)
    nn.Module.__init__(reference)
    torch.manual_seed(0)
    weight = torch.randn(16, 16, requires_grad=True)
    for step in range(3):
        batches = torch.cat([ranks_sharded.batch(rank, step) for rank in range(2)])
        (grad,) = torch.autograd.grad(torch.relu(batches @ weight).square().mean(), weight)
        weight = (weight - 0.1 * grad).detach().requires_grad_()
    torch.testing.assert_close(first.after["weight"], weight.detach())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tensor parallel", "sequence parallel"])
def test_replicas_of_a_sharded_model_are_averaged(ranks4: Ranks, name: str) -> None:
    for found, expected, notes in ranks4(ranks_sharded.two_dimensions, name):
        assert_same(found, expected)
        assert notes == (Note.UNSEEN.format(what=Unseen.DTENSOR),)


@pytest.mark.distributed
def test_a_group_of_copies_and_shards_is_an_error(ranks4: Ranks) -> None:
    for error in ranks4(ranks_sharded.mixed_up):
        assert error.startswith("ValueError")
        assert "parameter 'up.weight': DTensor shards it over some of the ranks [0, 1, 2, 3]" in error
        assert "mesh['dp'].get_group()" in error


@pytest.mark.distributed
def test_other_shards_of_another_mesh_are_an_error(ranks4: Ranks) -> None:
    for error in ranks4(ranks_sharded.crosswise):
        assert "'up.weight' (parameter float32 [32, 16], S(0) number 0: 'trained')" in error
        assert "'up.weight' (parameter float32 [32, 16], S(0) number 1: 'trained')" in error


def test_a_partial_sum_as_a_parameter_is_an_error() -> None:
    with fake_group(2), fresh_compiler():
        model = Localised(init_device_mesh("cpu", (2,)))
        model.weight = nn.Parameter(DTensor.from_local(torch.randn(16, 16), model.weight.device_mesh, [Partial()], run_check=False))
        with pytest.raises(
            Exception, match=r"parameter 'weight' has the placements .*Partial.*: data_parallel cannot average a partial sum"
        ):
            torch.compile(model, backend=dct, options=AVERAGED)(torch.randn(8, 16))


def test_a_gradient_that_is_placed_otherwise_than_its_parameter_is_an_error() -> None:
    class Scaled(nn.Module):
        def __init__(self, mesh: DeviceMesh) -> None:
            super().__init__()
            self.mesh, self.scale = mesh, nn.Parameter(DTensor.from_local(torch.ones(16), mesh, [Replicate()], run_check=False))

        def forward(self, x: Tensor) -> Tensor:
            return (DTensor.from_local(x, self.mesh, [Shard(1)]) * self.scale).to_local()

    with fake_group(4), fresh_compiler():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        compiled = torch.compile(Scaled(mesh["tp"]), backend=dct, options={"data_parallel": mesh["dp"].get_group()})
        with pytest.raises(Exception, match=r"parameter 'scale' has the shape \(16,\) on this rank and its gradient \(8,\)"):
            compiled(torch.randn(8, 8))


@pytest.mark.parametrize("name", ["tensor parallel", "fsdp"])
def test_the_option_is_not_advised_where_parameters_are_sharded(name: str) -> None:
    with fake_group(2), fresh_compiler():
        compiled = torch.compile(MODELS[name](init_device_mesh("cpu", (2,)), 0), backend=dct)
        compiled(torch.randn(8, 16)).sum().backward()
        assert GRADIENTS_OUTSIDE not in dct_compile.report().notes
