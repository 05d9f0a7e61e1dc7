"""Model parallelism over gloo ranks: compiled models against the same models in eager mode that mask every row themselves."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.row_mask import masked

pytestmark = pytest.mark.distributed

WIDTH = 64
ROWS = 12
COLUMNS = ("gather_columns",) if torch.__version__ >= "2.13" else ()
"""Dynamo of torch 2.12 cannot trace it: docs/versions.md."""
KINDS = ("all_to_all", "users_all_to_all", "uneven", "three_dims", "gather_rows", *COLUMNS, "reduce_scatter", "all_reduce")
SUMMED = ("gather_rows", "gather_columns", "reduce_scatter", "all_reduce")
"""Their values are summed over the ranks forward or backward: each addend is rounded, not the sum."""
SPLITS = [([9, 0], [9, 3]), ([3, 12], [0, 12])]
"""Of "uneven", by rank: rows received from each rank, rows sent to each."""
Splits = tuple[list[int], list[int]]


def exchange(kind: str, h: Tensor, splits: Splits) -> Tensor:
    world = dist.group.WORLD
    if kind == "all_to_all" or (kind == "users_all_to_all" and not torch.compiler.is_compiling()):  # outside of graphs it has no gradient
        return funcol.all_to_all_single_autograd(h, None, None, world)
    if kind == "users_all_to_all":
        received = torch.empty_like(h)
        dist.all_to_all_single(received, h)
        return received
    if kind == "uneven":
        return funcol.all_to_all_single_autograd(h, splits[0], splits[1], world)
    if kind == "three_dims":
        return funcol.all_to_all_single_autograd(h.reshape(-1, 3, WIDTH), None, None, world).reshape(-1, WIDTH)
    if kind == "gather_rows":
        return funcol.all_gather_tensor_autograd(h, 0, world)
    if kind == "gather_columns":
        return funcol.all_gather_tensor_autograd(h, 1, world).reshape(-1, WIDTH)
    if kind == "reduce_scatter":
        return funcol.reduce_scatter_tensor_autograd(h, "sum", 0, world)
    return funcol.all_reduce(h, "sum", world)


class Boundaries(nn.Module):
    """One branch per kind of collective: linear, ReLU, exchange, linear."""

    def __init__(self, mask: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mask = mask
        self.bottom = nn.ModuleList(nn.Linear(16, WIDTH) for _ in KINDS)
        self.top = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in KINDS)

    def forward(self, inputs: Sequence[Tensor], splits: Splits) -> list[Tensor]:
        outputs = []
        for kind, bottom, top, x in zip(KINDS, self.bottom, self.top, inputs, strict=True):
            h = torch.relu(bottom(x))
            if self.mask is not None:
                h = self.mask(h)
            outputs.append(top(exchange(kind, h, splits)))
        return outputs


class Outcome(NamedTuple):
    """By kind: output, gradient of the input, gradients of the weights on both sides; expected and got."""

    expected: dict[str, list[Tensor]]
    got: dict[str, list[Tensor]]
    decisions: list[tuple[str, str, str]]


def run(module: Any, model: Boundaries, rank: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    inputs = [torch.randn(ROWS, 16, generator=generator).requires_grad_() for _ in KINDS]
    outputs = module(inputs, SPLITS[rank])
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return {
        kind: [output.detach(), x.grad, *(parameter.grad for parameter in (*bottom.parameters(), *top.parameters()))]
        for kind, output, x, bottom, top in zip(KINDS, outputs, inputs, model.bottom, model.top, strict=True)
    }


def against_masked(rank: int, world_size: int, density: float, value_dtype: str) -> Outcome:
    model = Boundaries()
    reference = Boundaries(partial(masked, density=density, value_dtype=getattr(torch, value_dtype)))
    got = run(torch.compile(model, backend=dct, options={"mp_density": density, "mp_value_dtype": value_dtype}), model, rank)
    decisions = [(site.collective, site.kind, site.decision) for site in dct_compile.report().sites]
    return Outcome(run(reference, reference, rank), got, decisions)


every_setting = pytest.mark.parametrize(("density", "value_dtype"), [(0.05, "float32"), (0.25, "float32"), (0.25, "bfloat16")])


@every_setting
def test_every_collective_is_compressed_forward_and_backward(ranks2_once: Ranks, density: float, value_dtype: str) -> None:
    for result in ranks2_once(against_masked, density, value_dtype):
        assert len(result.decisions) == 2 * len(KINDS)
        assert {decision for *_, decision in result.decisions} == {"compressed"}


@every_setting
@pytest.mark.parametrize("kind", KINDS)
def test_it_sends_the_largest_of_each_row_and_the_gradient_behind_the_same_mask(
    ranks2_once: Ranks, density: float, value_dtype: str, kind: str
) -> None:
    rounding = 2.0**-7 if value_dtype == "bfloat16" and kind in SUMMED else 0.0
    for result in ranks2_once(against_masked, density, value_dtype):
        for got, expected in zip(result.got[kind], result.expected[kind], strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=(1e-6 + rounding) * scale)
