"""Gradients under DDP that are no plain floats: sparse ones, complex ones, and several dtypes in one model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.reasons import Reason
from tests.rank_pool import Ranks
from tests.ranks import digest, fresh_compiler
from tests.ranks_audit import owned
from tests.ranks_ddp import ddp_of

pytestmark = pytest.mark.distributed


class Sparse(nn.Module):
    """A linear layer behind an embedding with a sparse gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.linear = nn.Embedding(200, 16, sparse=True), nn.Linear(16, 16)

    def forward(self, seed: int) -> Tensor:
        return self.linear(self.table(torch.randint(0, 200, (8, 5), generator=torch.Generator().manual_seed(seed))).mean(1)).square()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filter, self.linear = nn.Parameter(torch.randn(16, 16, dtype=torch.cfloat)), nn.Linear(16, 16)

    def forward(self, seed: int) -> Tensor:
        x = self.linear(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)))
        return torch.view_as_real(x.to(torch.cfloat) @ self.filter).square()


class Mixed(nn.Module):
    """A linear layer in each of four dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16, dtype=dtype) for name, dtype in names.items()})

    def forward(self, seed: int) -> Tensor:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        parts = [layer(x.to(layer.weight.dtype)).float() for layer in self.layers.values()]
        return torch.stack(parts).square()


@dataclass(frozen=True)
class Result:
    """``exact``: the parameters whose gradient, after the first step, is that of DDP without this project. ``kept``: those of which the
    gradient and what waits on all ranks make up the sum of all gradients. ``digests``: of all parameters. ``layout``: whether all gradients
    are as sparse, and of the dtype, as with DDP alone. ``state``: names. ``sites``: decision and reason by parameters."""

    exact: set[str]
    kept: set[str]
    digests: list[str]
    layout: bool
    state: list[str]
    sites: dict[str, tuple[str, str]]


def trained(
    rank: int, world_size: int, make: Callable[[], nn.Module], options: dict[str, Any], inside: bool, settings: dict[str, Any]
) -> Result:
    with fresh_compiler():
        model, alone = make(), make()
        module, compiled = ddp_of(model, options, inside, **settings)
        plain = DistributedDataParallel(alone, **settings)
        compiled(rank).mean().backward()
        plain(rank).mean().backward()
        state = dct_compile.state_dict(model)
        exact, kept, layout = set(), set(), True
        for (name, parameter), other in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert parameter.grad is not None
            assert other.grad is not None
            layout &= (parameter.grad.layout, parameter.grad.dtype) == (other.grad.layout, other.grad.dtype)
            found, expected = parameter.grad.to_dense(), other.grad.to_dense()
            if torch.equal(found, expected):
                exact.add(name)
            if name in state:
                waiting = state[name]["residual"].double()
                if "owner" in state[name]:
                    elements, held = owned(state[name])
                    waiting[elements] += held
                torch.distributed.all_reduce(waiting)
                total = found.double() + waiting.view(found.shape) / world_size
                tolerance = 8 * torch.finfo(found.dtype).eps * float(expected.abs().max())
                if float((total - expected.double()).abs().max()) <= tolerance:
                    kept.add(name)
        digests = []
        for step in range(1, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad.to_dense()
            module.zero_grad()
            digests.append(digest(_real(model)))
            compiled(10 * step + rank).mean().backward()
        sites = {site.name: (site.decision, site.reason) for site in dct_compile.report().sites if site.kind == "gradient"}
        return Result(exact, kept, digests, layout, sorted(state), sites)


def _real(model: nn.Module) -> list[Tensor]:
    return [torch.view_as_real(item.detach()) if item.is_complex() else item.detach() for item in model.parameters()]


def agreed(results: list[Result]) -> Result:
    first, second = results
    assert first == second
    assert first.layout
    return first


GATHER = {"gradient_scheme": "gather", "dp_density": 0.05}
SCHEMES = {name: {**GATHER, "gradient_scheme": name} for name in ("gather", "owner", "powersgd", "random_k")}
SPARSE: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    **{f"{name} inside": (options, True, {}) for name, options in SCHEMES.items()},
    "gather around": (GATHER, False, {}),
    "exempt inside": ({**GATHER, "exempt": ["table.*"]}, True, {}),
    "exempt around": ({**GATHER, "exempt": ["table.*"]}, False, {}),
    "unused": (GATHER, True, {"find_unused_parameters": True}),
    "views": (GATHER, True, {"gradient_as_bucket_view": True}),
    "static": (GATHER, True, {"static_graph": True}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_gradient_is_what_torch_makes_of_it(ranks2: Ranks, name: str) -> None:
    result = agreed(ranks2(trained, Sparse, *SPARSE[name]))
    assert "table.weight" in result.exact
    assert result.kept == {"linear.weight"}
    assert result.state == ["linear.weight"]
    assert result.sites.pop("table.weight") == ("dense", Reason.SPARSE)
    assert {decision for decision, _ in result.sites.values()} == {"compressed"}


@pytest.mark.parametrize("options", [{"min_numel": 100000}, {"exempt": ["*"]}], ids=str)
def test_a_sparse_gradient_beside_dense_ones(ranks2: Ranks, options: dict[str, Any]) -> None:
    result = agreed(ranks2(trained, Sparse, options, True, {}))
    assert result.exact == {"table.weight", "linear.weight", "linear.bias"}
    ((decision, reason),) = result.sites.values()
    assert decision == "dense"
    assert Reason.SPARSE in reason


@pytest.mark.parametrize("inside", [True, False])
def test_a_complex_gradient_stays_dense_beside_a_compressed_one(ranks2: Ranks, inside: bool) -> None:
    result = agreed(ranks2(trained, Complex, GATHER, inside, {}))
    assert "filter" in result.exact
    assert result.kept == {"linear.weight"}
    assert result.sites.pop("filter") == ("dense", Reason.DTYPE.format(dtype="complex64"))
    assert {decision for decision, _ in result.sites.values()} == {"compressed"}


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_dtypes_beside_each_other(ranks2: Ranks, scheme: str) -> None:
    """Gradients of the dtypes that are compressed lose nothing; float64 is exact."""
    result = agreed(ranks2(trained, Mixed, SCHEMES[scheme], True, {}))
    compressed = {f"layers.{name}.weight" for name in ("fp32", "bf16", "fp16")}
    assert set(result.state) == compressed
    assert {"layers.fp64.weight", "layers.fp64.bias"} <= result.exact
    assert [reason for decision, reason in result.sites.values() if decision == "dense"] == [Reason.DTYPE.format(dtype="float64")]
    assert result.kept == compressed
