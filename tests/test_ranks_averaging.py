"""The values that option ``data_parallel`` averages: every dtype, tied and shared parameters, sparse gradients."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Reason
from tests.rank_pool import Ranks
from tests.ranks_audit import owned
from tests.tracing import fake_group, trace


class Product(nn.Module):
    """A product in ``dtype``, and one in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(32, 32, dtype=dtype)), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        product = x.to(self.first.dtype) @ self.first
        return self.second((product.abs() if product.is_complex() else product).float())


class Tied(nn.Module):
    """One weight, used twice: in one graph, or in two."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.broken = nn.Parameter(torch.randn(32, 32) / 6), broken

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(x @ self.weight)
        if self.broken:
            torch._dynamo.graph_break()
        return hidden @ self.weight.T


class PartlyFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom, self.middle, self.top = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.middle.requires_grad_(False)
        self.top.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(torch.relu(self.middle(torch.relu(self.bottom(x)))))


class Looked(nn.Module):
    """A table whose gradient is sparse, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(100, 16, sparse=True), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.table(ids).mean(1))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + rank))


def gradients(model: nn.Module, call: Any, rank: int, step: int) -> dict[str, Tensor]:
    """Returns the gradient of each parameter, zeros where there is none, after one step of its own."""
    model.zero_grad()
    call(batch(rank, step)).square().mean().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def summed(values: Tensor) -> Tensor:
    """Returns the sum over the ranks, as real numbers in float64."""
    total = (torch.view_as_real(values) if values.is_complex() else values).double()
    dist.all_reduce(total)
    return total


class Averaged(NamedTuple):
    """``found``, ``expected``: the gradient of each parameter, real numbers in float64. ``reasons``: by dtype of the site."""

    found: dict[str, Tensor]
    expected: dict[str, Tensor]
    reasons: dict[str, str]


def averaged(rank: int, world_size: int, dtype: torch.dtype, density: float) -> Averaged:
    model = Product(dtype)
    compiled = torch.compile(copy.deepcopy(model), backend=dct, options={"data_parallel": True, "dp_density": density})
    expected = {name: summed(grad) / world_size for name, grad in gradients(model, model, rank, 0).items()}
    found = {name: summed(grad) / world_size for name, grad in gradients(compiled, compiled, rank, 0).items()}
    reasons = {site.dtype: site.reason for site in dct_compile.report().sites}
    return Averaged({name.removeprefix("_orig_mod."): grad for name, grad in found.items()}, expected, reasons)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64])
def test_what_no_scheme_carries_is_averaged_whole(ranks2: Ranks, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for outcome in ranks2(averaged, dtype, 0.1):
        torch.testing.assert_close(outcome.found["first"], outcome.expected["first"], rtol=1e-5, atol=1e-7)
        assert outcome.found["first"].abs().min() > 0
        assert outcome.reasons[name] == Reason.DTYPE.format(dtype=name)


@pytest.mark.distributed
def test_each_dtype_is_averaged_in_a_buffer_of_its_own(ranks2: Ranks) -> None:
    for outcome in ranks2(averaged, torch.bfloat16, 1):
        assert outcome.reasons == {"float32": Reason.DP_DENSITY_ONE, "bfloat16": Reason.DP_DENSITY_ONE}
        for name, expected in outcome.expected.items():
            tolerance = 2e-2 if name == "first" else 1e-5
            torch.testing.assert_close(outcome.found[name], expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


MODELS = {
    "tied": (lambda: Tied(broken=False), {"weight"}),
    "in two graphs": (lambda: Tied(broken=True), {"weight"}),
    "partly frozen": (PartlyFrozen, {"bottom.weight", "top.weight"}),
}


def pending(entry: dict[str, Any]) -> Tensor:
    """Returns what was not sent yet."""
    residual = entry["residual"].double()
    if "owner" in entry:
        elements, held = owned(entry)
        residual[elements] += held.double()
    return residual


def audited(rank: int, world_size: int, name: str, scheme: str) -> tuple[set[str], dict[str, tuple[Tensor, Tensor]]]:
    """Trains; returns the names in the state, and of each parameter all that was received or waits, and the sum of all gradients."""
    model = MODELS[name][0]()
    eager = copy.deepcopy(model)
    options = {"data_parallel": True, "dp_density": 0.05, "gradient_scheme": scheme, "min_numel": 64}
    compiled = torch.compile(model, backend=dct, options=options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    received = {key: torch.zeros(p.numel(), dtype=torch.float64) for key, p in model.named_parameters()}
    wanted = copy.deepcopy(received)
    for step in range(5):
        eager.load_state_dict(model.state_dict())
        for key, grad in gradients(eager, eager, rank, step).items():
            wanted[key] += grad.flatten()
        for key, grad in gradients(model, compiled, rank, step).items():
            received[key] += grad.flatten()
        optimizer.step()
    state = dct_compile.state_dict(model)
    waiting = {key: sum((pending(state[at]) for at in sorted(state) if at.split("@")[0] == key), torch.zeros(1)) for key in received}
    return set(state), {key: (summed(received[key] + waiting[key]), summed(wanted[key])) for key in sorted(received)}


@pytest.mark.distributed
@pytest.mark.parametrize("scheme", ["gather", "owner"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_gradient_is_lost(ranks2: Ranks, name: str, scheme: str) -> None:
    for state, sums in ranks2(audited, name, scheme):
        assert state == MODELS[name][1]
        for key, (found, wanted) in sums.items():
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=1e-5 * max(wanted.abs().max().item(), 1e-3), msg=lambda m, k=key: f"{k}: {m}"
            )


def test_a_sparse_gradient_is_an_error_that_names_its_parameter() -> None:
    with pytest.raises(Exception, match=r"parameter 'table.weight' has a sparse gradient, .*nn.Embedding\(sparse=False\)"):
        trace(Looked(), torch.randint(0, 100, (8, 5)), data_parallel=True)


def test_a_sparse_gradient_is_left_to_others_without_the_option() -> None:
    with fake_group(2):
        model = Looked()
        torch.compile(model, backend=dct)(torch.randint(0, 100, (8, 5))).sum().backward()
        assert model.table.weight.grad is not None
        assert model.table.weight.grad.is_sparse


def test_each_device_has_buffers_of_its_own() -> None:
    class TwoDevices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.here, self.there = nn.Linear(32, 32), nn.Linear(32, 32, device="meta")

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.here(x), self.there(y)

    report = dct_compile.explain(
        TwoDevices(), torch.randn(8, 32), torch.randn(8, 32, device="meta"), options={"data_parallel": True, "dp_density": 1}
    )
    assert {site.name for site in report.sites} == {"here.bias, here.weight", "there.bias, there.weight"}
