"""Model parallelism over gloo ranks: compiled models against the same models in eager mode that mask every row themselves."""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dct_compile
from dct_compile.backend import dct
from tests.ranks import fresh_compiler, run_ranks

WIDTH = 64
ROWS = 12
KINDS = ("all_to_all", "users_all_to_all", "uneven", "three_dims", "gather_rows", "gather_columns", "reduce_scatter", "all_reduce")
SUMMED = ("gather_rows", "gather_columns", "reduce_scatter", "all_reduce")
"""Their values are summed over the ranks forward or backward: each addend is rounded, not the sum."""


class RowMask(torch.autograd.Function):
    """The reference: the largest ``density * width`` entries of each row, exact zeros never; the gradient behind the same mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, density: float, value_dtype: torch.dtype) -> Tensor:
        order = x.abs().sort(dim=-1, descending=True, stable=True).indices
        kept = order[..., : ceil(density * x.shape[-1])]
        ctx.mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, kept, True) & (x != 0)
        ctx.value_dtype = value_dtype
        return (x * ctx.mask).to(value_dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad * ctx.mask).to(ctx.value_dtype).to(grad.dtype), None, None


def masked(h: Tensor, density: float, value_dtype: torch.dtype = torch.float32) -> Tensor:
    return RowMask.apply(h, density, value_dtype)


def exchange(kind: str, h: Tensor, splits: tuple[list[int], list[int]]) -> Tensor:
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

    def __init__(self, kinds: Sequence[str], mask: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds, self.mask = kinds, mask
        self.bottom = nn.ModuleList(nn.Linear(16, WIDTH) for _ in kinds)
        self.top = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in kinds)

    def forward(self, inputs: Sequence[Tensor], splits: tuple[list[int], list[int]]) -> list[Tensor]:
        outputs = []
        for kind, bottom, top, x in zip(self.kinds, self.bottom, self.top, inputs, strict=True):
            h = torch.relu(bottom(x))
            if self.mask is not None:
                h = self.mask(h)
            outputs.append(top(exchange(kind, h, splits)))
        return outputs


def inputs_of(rank: int, kinds: Sequence[str], rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    return [torch.randn(rows, 16, generator=generator).requires_grad_() for _ in kinds]


def run(
    module: Any, model: Boundaries, inputs: list[Tensor], splits: tuple[list[int], list[int]]
) -> dict[str, tuple[Tensor, Tensor, list[Tensor]]]:
    """Per kind: output, input gradient, the gradients of the weights on both sides."""
    model.zero_grad()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = module(leaves, splits)
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return {
        kind: (output.detach(), x.grad, [p.grad.clone() for p in (*bottom.parameters(), *top.parameters())])
        for kind, output, x, bottom, top in zip(model.kinds, outputs, leaves, model.bottom, model.top, strict=True)
    }


def against_masked(rank: int, world_size: int, settings: list[tuple[float, str]], splits: list[Any]) -> list[Any]:
    results = []
    for density, dtype in settings:
        with fresh_compiler():
            model = Boundaries(KINDS)
            reference = Boundaries(KINDS, partial(masked, density=density, value_dtype=getattr(torch, dtype)))
            inputs = inputs_of(rank, KINDS, ROWS)
            compiled = torch.compile(model, backend=dct, options={"mp_density": density, "mp_value_dtype": dtype})
            got = run(compiled, model, inputs, splits[rank])
            sites = [(site.collective, site.kind, site.decision, site.reason) for site in dct_compile.report().sites]
            results.append((run(reference, reference, inputs, splits[rank]), got, sites))
    return results


@pytest.mark.distributed
def test_every_collective_sends_the_largest_of_each_row_and_the_gradient_behind_the_same_mask() -> None:
    settings = [(0.05, "float32"), (0.25, "float32"), (0.25, "bfloat16")]
    splits = [([9, 0], [9, 3]), ([3, 12], [0, 12])]
    for rank_results in run_ranks(against_masked, 2, settings, splits):
        for (_, dtype), (expected, got, sites) in zip(settings, rank_results, strict=True):
            assert len(sites) == 2 * len(KINDS)
            assert [site for site in sites if site[2] != "compressed"] == []
            for kind in KINDS:
                rounding = 2.0**-7 if dtype == "bfloat16" and kind in SUMMED else 0.0
                for result, reference in zip(flat(got[kind]), flat(expected[kind]), strict=True):
                    scale = reference.abs().max().item()
                    torch.testing.assert_close(
                        result, reference, rtol=1e-5, atol=(1e-6 + rounding) * scale, msg=lambda m, k=kind: f"{k}: {m}"
                    )


def flat(result: tuple[Tensor, Tensor, list[Tensor]]) -> list[Tensor]:
    return [result[0], result[1], *result[2]]


class FromTensor(nn.Module):
    """Splits that only the data know."""

    def __init__(self, mask: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.mask = nn.Linear(16, WIDTH), mask

    def forward(self, x: Tensor, received: Tensor, sent: Tensor) -> Tensor:
        h = torch.relu(self.bottom(x))
        h = self.mask(h) if self.mask is not None else h
        outs, ins = received.tolist(), sent.tolist()
        for size in (*outs, *ins):
            torch._check(size >= 0)
            torch._check(size <= 100)
        return funcol.all_to_all_single_autograd(h, outs, ins, dist.group.WORLD)


def changing_splits(rank: int, world_size: int) -> dict[str, Any]:
    # tables[step][sender][receiver]
    tables = [
        [[2, 3, 4], [4, 2, 3], [5, 6, 2]],
        [[3, 4, 5], [2, 7, 4], [2, 4, 6]],
        [[6, 2, 4], [3, 3, 2], [4, 5, 7]],
        [[0, 5, 2], [3, 0, 4], [2, 0, 3]],
    ]
    options = {"mp_density": 0.1, "mp_value_dtype": "float32"}
    kinds = ("uneven",)
    pairs: dict[str, Any] = {"lists": [], "tensors": [], "graphs": []}

    mask = partial(masked, density=0.1)

    def splits(table: list[list[int]]) -> tuple[list[int], list[int]]:
        return [row[rank] for row in table], table[rank]

    with fresh_compiler():
        model, reference = Boundaries(kinds), Boundaries(kinds, mask)
        compiled = torch.compile(model, backend=dct, options=options)
        for step, table in enumerate(tables):
            inputs = inputs_of(rank, kinds, sum(table[rank]), step)
            got = flat(run(compiled, model, inputs, splits(table))["uneven"])
            pairs["lists"].append((flat(run(reference, reference, inputs, splits(table))["uneven"]), got))
            pairs["graphs"].append(counters["stats"]["unique_graphs"])
        pairs["report"] = [(site.decision, site.reason) for site in dct_compile.report().sites]
    with fresh_compiler(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        by_tensor, reference_by_tensor = FromTensor(), FromTensor(mask)
        compiled = torch.compile(by_tensor, backend=dct, options=options, dynamic=True)
        for step, table in enumerate(tables):
            x = inputs_of(rank, kinds, sum(table[rank]), step)[0].detach()
            received, sent = (torch.tensor(sizes) for sizes in splits(table))
            results = []
            for module, holder in ((reference_by_tensor, reference_by_tensor), (compiled, by_tensor)):
                holder.zero_grad()
                leaf = x.clone().requires_grad_()
                output = module(leaf, received, sent)
                output.square().sum().backward()
                results.append([output.detach(), leaf.grad, holder.bottom.weight.grad.clone()])
            pairs["tensors"].append(tuple(results))
        pairs["tensor_report"] = [(site.decision, site.reason) for site in dct_compile.report().sites]
    return pairs


@pytest.mark.distributed
def test_splits_may_change_from_call_to_call_and_may_be_zero() -> None:
    for result in run_ranks(changing_splits, 3):
        for how in ("lists", "tensors"):
            for step, (expected, got) in enumerate(result[how]):
                for reference, tensor in zip(expected, got, strict=True):
                    torch.testing.assert_close(tensor, reference, rtol=1e-5, atol=1e-6, msg=lambda m, s=(how, step): f"{s}: {m}")
        assert result["graphs"][2] == result["graphs"][1], "once the splits are symbolic, other splits need no other graph"
        assert {decision for decision, _ in result["report"]} == {"compressed"}
        assert {decision for decision, _ in result["tensor_report"]} == {"compressed"}
