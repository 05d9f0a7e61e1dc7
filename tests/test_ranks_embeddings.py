"""Embedding exchanges over gloo ranks, and what must stay as backend "inductor" computes it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from tests.ranks import fresh_compiler, run_ranks

DIM = 32
ROWS = 64
CODES = {"int8": 127, "int4": 7}


class Lookup(nn.Module):
    """Sends each row of an embedding to another rank and returns it as it arrives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(100, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return funcol.all_to_all_single_autograd(self.table(ids), None, None, dist.group.WORLD)


def exchanged(x: Tensor) -> Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


def codecs(rank: int, world_size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randperm(100, generator=generator)[:ROWS]  # each id once: a row of the weight's gradient is one row of the exchange
    # Rows of very different sizes, one of zeros.
    weights = torch.randn(ROWS, DIM, generator=generator) * torch.logspace(-6, 3, ROWS).unsqueeze(1)
    weights[3] = 0
    results: dict[str, Any] = {}
    for codec in ("int8", "int4", "threshold", "dense"):
        with fresh_compiler():
            model = Lookup()
            with torch.no_grad():
                model.table.weight.mul_(torch.logspace(-5, 2, 100).unsqueeze(1))
            options = {"embedding_codec": codec, "mp_density": 0.25, "mp_value_dtype": "float32"}
            received = torch.compile(model, backend=dct, options=options)(ids)
            (received * weights).sum().backward()
            grad = model.table.weight.grad
            assert grad is not None
            exact = exchanged(model.table.weight.detach()[ids]), exchanged(weights)
            sites = [(site.kind, site.decision, site.dense_bytes / site.wire_bytes) for site in dct_compile.report().sites]
            results[codec] = (received.detach(), exact[0]), (grad[ids], exact[1]), sites
    return results


@pytest.mark.distributed
def test_embedding_codecs_keep_their_error_bounds_both_ways() -> None:
    for results in run_ranks(codecs, 2):
        for codec, codes in CODES.items():
            forward, backward, sites = results[codec]
            assert [(kind, decision) for kind, decision, _ in sites] == [("embedding", "compressed"), ("embedding_gradient", "compressed")]
            assert all(ratio > (3.7 if codec == "int8" else 7) for *_, ratio in sites)
            for got, exact in (forward, backward):
                largest = exact.abs().amax(dim=1, keepdim=True)
                step = largest / codes * (1 + 2.0**-7)  # the scale is rounded up to bfloat16
                error = got - exact
                assert bool((error.abs() <= step).all()), codec
                assert torch.equal(got[largest.flatten() == 0], exact[largest.flatten() == 0])
                assert not torch.equal(got, exact)
                # Stochastic rounding is unbiased: the errors, as fractions of a step, are within [-1, 1] with mean 0.
                fractions = (error / step.clamp(min=1e-30))[largest.flatten() > 0]
                assert fractions.mean().abs().item() < 5 * 0.6 / fractions.numel() ** 0.5
        (received, exact), (grad, exact_grad), sites = results["threshold"]
        assert {decision for _, decision, _ in sites} == {"compressed"}
        kept = received != 0
        assert kept.sum(dim=1).max() == DIM // 4
        assert torch.equal(received[kept], exact[kept])
        assert bool((received.abs().amax(dim=1) == exact.abs().amax(dim=1)).all())
        sent = grad != 0
        assert torch.equal(grad[sent], exact_grad[sent])
        assert sent.sum(dim=1).max() == DIM // 4
        (received, exact), (grad, exact_grad), sites = results["dense"]
        assert {decision for _, decision, _ in sites} == {"dense"}
        assert torch.equal(received, exact)
        assert torch.equal(grad, exact_grad)


class Everything(nn.Module):
    """Collectives of every kind, some of them on types that are never compressed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bottom, self.top = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        world = dist.group.WORLD
        count = funcol.all_reduce(ids, "sum", world)
        mean = funcol.all_reduce(ids.double().reshape(-1, 8).sqrt(), "sum", world)
        everywhere = funcol.all_gather_tensor(ids, 0, world)
        h = torch.relu(self.bottom(funcol.all_to_all_single_autograd(self.table(ids), None, None, world)))
        h = funcol.all_gather_tensor_autograd(funcol.all_to_all_single_autograd(h, None, None, world), 0, world)
        h = funcol.all_reduce(funcol.reduce_scatter_tensor_autograd(h, "sum", 0, world), "sum", world)
        return self.top(h), mean, count + everywhere[: ids.shape[0]]


def untouched(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(rank))
    whole = {"mp_density": 1, "embedding_codec": "dense", "mp_value_dtype": "float32"}
    for name, backend, options in (("inductor", "inductor", None), ("whole", dct, whole), ("masked", dct, {"mp_eval": False})):
        with fresh_compiler():
            model = Everything()
            compiled = torch.compile(model, backend=backend, options=options)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            outputs = []
            for _ in range(3):
                prediction, mean, count = compiled(ids)
                prediction.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                outputs += [prediction.detach(), mean, count]
            trained = dct_compile.report().sites
            dct_compile.reset_report()
            with torch.no_grad():
                model.eval()
                evaluated = compiled(ids)[0]
            in_evaluation = dct_compile.report().sites
            results[name] = [*outputs, *(p.detach() for p in model.parameters())], evaluated, trained, in_evaluation
    with fresh_compiler(), torch.no_grad():
        # An average has no backward in torch, so it is met in evaluation only.
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank))

        def average(x: Tensor) -> Tensor:
            return funcol.reduce_scatter_tensor(x * 1, "avg", 0, dist.group.WORLD)

        results["average"] = torch.compile(average, backend=dct, options={"mp_density": 0.25, "mp_value_dtype": "float32"})(x)
        smallest = x.abs().topk(16, dim=1).values[:, -1:]
        masked = exchanged(torch.where(x.abs() >= smallest, x, 0))
        results["expected average"] = masked.reshape(2, 4, 64).sum(0) / 2
    return results


@pytest.mark.distributed
def test_density_1_and_types_that_are_not_compressed_equal_inductor() -> None:
    for results in run_ranks(untouched, 2):
        expected, evaluated, _, _ = results["inductor"]
        got, got_evaluated, sites, in_evaluation = results["whole"]
        for position, (reference, tensor) in enumerate(zip(expected, got, strict=True)):
            assert torch.equal(reference, tensor), f"tensor {position} differs"
        assert torch.equal(evaluated, got_evaluated)
        assert {site.decision for site in (*sites, *in_evaluation)} == {"dense"}
        masked, _, sites, in_evaluation = results["masked"]
        for position in range(9):
            assert torch.equal(masked[position], expected[position]) == (position % 3 != 0), "only floating-point messages may change"
        dense = {site.dtype: site.reason for site in sites if site.decision == "dense"}
        assert set(dense) == {"int64", "float64"}
        assert all("is not compressed" in reason for reason in dense.values())
        assert {site.dtype for site in sites if site.decision == "compressed"} == {"float32"}
        assert {site.decision for site in in_evaluation} == {"dense"}
        assert torch.equal(results["average"], results["expected average"])
