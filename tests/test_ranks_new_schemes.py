"""The schemes "powersgd" and "random_k" on gloo ranks: under DDP, in generated code, saved, resumed, and taken over from another scheme."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dct_compile
from dct_compile.backend import dct
from dct_compile.reasons import Reason
from dct_compile.runtime import RUNTIME
from tests.rank_pool import Ranks
from tests.ranks import digest, fresh_compiler
from tests.ranks_balance import Balance, wrap
from tests.ranks_ddp import Net, Options, ddp_of, train

OPTIONS: dict[str, Options] = {
    "powersgd": {"gradient_scheme": "powersgd", "rank": 2},
    "random_k": {"gradient_scheme": "random_k", "dp_density": 0.1},
    "gather": {"gradient_scheme": "gather", "dp_density": 0.1, "dp_value_dtype": "float32"},
}
SCHEMES = ("powersgd", "random_k")
SMALL_BUCKETS = 0.004
COMPRESSED = ["bottom.weight", "middle.weight", "side.weight", "top.weight"]
SENT = {"powersgd": 2 * (16 + 64 + 64 + 32 + 16 + 32 + 32 + 8), "random_k": 103 + 205 + 52 + 26}
STEPS = 5
Run = tuple[list[str], list[Tensor], dict[str, Any]]


def ending(module: nn.Module, digests: list[str]) -> Run:
    return digests, [parameter.detach().clone() for parameter in module.parameters()], dct_compile.state_dict(module)


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    return [tensor for name in sorted(state) for _, tensor in sorted(state[name].items())]


def residuals_in(state: dict[str, Any]) -> list[Tensor]:
    return [state[name]["residual"] for name in sorted(state)]


def ways(rank: int, world_size: int, scheme: str) -> dict[str, Any]:
    """The same training under DDP and in graphs, with generated code and without."""
    results: dict[str, Any] = {}
    options = OPTIONS[scheme]
    with fresh_compiler():
        module, compiled = ddp_of(Net(), options, inside=True)
        with dct_compile.monitor(every=1) as monitor:
            results["inside"] = ending(module, train(module, compiled, rank, range(STEPS)))
            assert monitor.step()
        norm = torch.cat([entry["residual"] for entry in results["inside"][2].values()]).norm().item()
        results["norm"] = norm
        results["monitor"] = [site for site in monitor.sites if site.kind == "gradient"], monitor.summary()
        results["report"] = [site for site in dct_compile.report().sites if site.kind == "gradient"]
    with fresh_compiler(), torch._dynamo.config.patch(optimize_ddp=False):  # Dynamo cannot split its graphs at buckets this small
        module, compiled = ddp_of(Net(), options, inside=False, bucket_cap_mb=SMALL_BUCKETS)
        results["buckets"] = ending(module, train(module, compiled, rank, range(STEPS)))
        results["number of buckets"] = sum(site.kind == "gradient" for site in dct_compile.report().sites)
    for name, fallback in (("interpreted", True), ("generated", False)):
        with fresh_compiler(), torch._inductor.config.patch(fallback_by_default=fallback):
            model = Net()
            compiled = torch.compile(model, backend=dct, options={**options, "data_parallel": True})
            digests = train(model, compiled, rank, range(2))
            held = [tensor for bucket, index in _states(model) if index == 0 for tensor in bucket.tensors.values()]
            before = [tensor.clone() for tensor in held]
            file = io.BytesIO()
            torch.save((model.state_dict(), dct_compile.state_dict(model)), file)
            digests += train(model, compiled, rank, range(2, STEPS))
            now = [tensor for bucket, index in _states(model) if index == 0 for tensor in bucket.tensors.values()]
            assert all(one is other for one, other in zip(held, now, strict=True))
            results[f"{name} changed"] = [not torch.equal(old, new) for old, new in zip(before, now, strict=True)]
            results[name] = ending(model, digests)
    with fresh_compiler():
        model = Net()
        weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        model.load_state_dict(weights)
        dct_compile.load_state_dict(model, state)
        compiled = torch.compile(model, backend=dct, options={**options, "data_parallel": True})
        with torch._inductor.config.patch(fallback_by_default=False):
            digests = train(model, compiled, rank, range(2, STEPS))
        results["resumed"] = ending(model, digests)
    return results


def _states(model: nn.Module) -> list[Any]:
    return [found for parameter in model.parameters() for found in RUNTIME.states.entries(parameter)]


@pytest.mark.distributed
@pytest.mark.parametrize("scheme", SCHEMES)
def test_ddp_and_generated_code_compute_the_same(ranks2: Ranks, scheme: str) -> None:
    first, second = ranks2(ways, scheme)
    for name in ("inside", "buckets", "interpreted", "generated", "resumed"):
        digests, parameters, state = first[name]
        assert digests == second[name][0], f"{name}: the ranks' parameters differ"
        assert sorted(state) == COMPRESSED
        assert all(entry["counters"].tolist() == [STEPS, 0, 0, 0, 0] for entry in state.values()), name
        torch.testing.assert_close(parameters, first["inside"][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(residuals_in(state), residuals_in(first["inside"][2]), rtol=1e-3, atol=1e-6)
    assert first["buckets"][0] == first["inside"][0], "neither the order of wrapping nor the buckets change what a parameter sends"
    assert first["number of buckets"] > 1
    for results in (first, second):
        residuals = [entry["residual"] for entry in results["inside"][2].values()]
        assert all(residual.abs().max() > 1e-4 for residual in residuals)
        for name in ("interpreted", "generated"):
            assert results[f"{name} changed"] == [True] * 3, f"{name}: residual, factor or draws, and counters are updated in place"
        assert results["generated"][0][2:] == results["resumed"][0], "resumed to the bit"
        assert digest(tensors_of(results["generated"][2])) == digest(tensors_of(results["resumed"][2]))

        (site,), summary = results["monitor"]
        dense = 64 + 32 + 8 + 32
        assert (site.steps, site.overflow, site.threshold) == (STEPS, 0, None)
        assert site.density == pytest.approx(SENT[scheme] / 3840)
        assert site.residual_norm == pytest.approx(results["norm"], rel=1e-4)
        assert site.wire_bytes == 4 * (SENT[scheme] + dense)
        assert site.bytes_sent == STEPS * site.wire_bytes
        assert summary["density"] == site.density
        (reported,) = results["report"]
        assert reported.decision == "compressed"
        words = {"powersgd": "powersgd, rank 2; dense: ", "random_k": "random_k, density 0.1; dense: "}[scheme]
        assert reported.reason.startswith(words)
        assert (reported.dense_bytes, reported.wire_bytes) == (4 * (3840 + dense), 4 * (SENT[scheme] + dense))
        assert reported.density == pytest.approx(SENT[scheme] / 3840)


def residuals_of(state: dict[str, Any]) -> str:
    return digest(residuals_in(state))


def resumed(rank: int, scheme: str) -> tuple[list[str], list[str]]:
    """A run under DDP that goes on, and one that is saved and resumed before DDP has formed its final buckets."""
    with fresh_compiler():
        unbroken = wrap(Net(), OPTIONS[scheme], bucket_cap_mb=SMALL_BUCKETS)
        Balance(unbroken.module).train(unbroken, rank, range(3))
        weights = {name: tensor.clone() for name, tensor in unbroken.module.state_dict().items()}
        saved = dct_compile.state_dict(unbroken)
        expected = Balance(unbroken.module).train(unbroken, rank, range(3, 6))
        end = digest(tensors_of(dct_compile.state_dict(unbroken)))
    with fresh_compiler():
        model = Net()
        model.load_state_dict(weights)
        module = wrap(model, OPTIONS[scheme], bucket_cap_mb=SMALL_BUCKETS)
        dct_compile.load_state_dict(module, saved)
        found = Balance(model).train(module, rank, range(3, 6))
    return [*expected, end], [*found, digest(tensors_of(dct_compile.state_dict(module)))]


def balances(rank: int, world_size: int) -> dict[str, Any]:
    """Nothing is lost under DDP, whichever scheme takes over from which."""
    results: dict[str, Any] = {}
    for scheme in SCHEMES:
        with fresh_compiler():
            model = Net()
            balance = Balance(model)
            digests, kept, lost, counted = [], [], [], []
            for phase, name in enumerate(("gather", scheme, "gather")):
                state = dct_compile.state_dict(model)
                module = wrap(model, OPTIONS[name], bucket_cap_mb=SMALL_BUCKETS if name == scheme else 25)
                kept.append(residuals_of(state) == residuals_of(dct_compile.state_dict(model)))
                digests += balance.train(module, rank, range(4 * phase, 4 * phase + 4))
                after = dct_compile.state_dict(module)
                lost.append(balance.lost(after))
                counted.append({int(entry["counters"][0]) for entry in after.values()})
                largest = max(float(entry["residual"].abs().max()) for entry in after.values())
            results[f"{scheme} taken over"] = digests, kept, lost, counted, largest
        for dtype in (torch.bfloat16, torch.float16):
            with fresh_compiler():
                module = wrap(Net().to(dtype), OPTIONS[scheme], bucket_cap_mb=SMALL_BUCKETS)
                balance = Balance(module.module)
                results[f"{scheme} {dtype}"] = balance.train(module, rank, range(4)), balance.lost(dct_compile.state_dict(module))
        results[f"{scheme} resumed"] = resumed(rank, scheme)
        with fresh_compiler():
            module = wrap(Net(), OPTIONS[scheme], find_unused_parameters=True)
            balance = Balance(module.module)
            digests = balance.train(module, rank, range(3), rank == 0)
            results[f"{scheme} unused"] = digests, balance.lost({}), [(s.decision, s.reason) for s in dct_compile.report().sites]
            assert not dct_compile.state_dict(module)
    return results


@pytest.mark.distributed
def test_nothing_is_lost_under_ddp(ranks2: Ranks) -> None:
    first, second = ranks2(balances)
    for scheme in SCHEMES:
        for name in first:
            steps = 3 if "resumed" in name else None  # behind them comes the state, which is a rank's own
            assert first[name][0][:steps] == second[name][0][:steps], f"{name}: the ranks' parameters differ"
        for results in (first, second):
            expected, found = results[f"{scheme} resumed"]
            assert found == expected, f"{scheme}: resumed to the bit"
            _, kept, lost, counted, largest = results[f"{scheme} taken over"]
            assert kept == [True] * 3
            assert largest > 1e-3
            assert max(lost) < 1e-6
            assert counted == [{4}] * 3, "each scheme counts its own steps"
            assert results[f"{scheme} torch.bfloat16"][1] < 4e-3
            assert results[f"{scheme} torch.float16"][1] < 5e-4
            _, lost, sites = results[f"{scheme} unused"]
            assert lost < 1e-6
            reason = f"{scheme} cannot leave out a parameter for one step, as find_unused_parameters asks"
            assert sites == [("dense", reason), ("dense", Reason.USED_PARAMETERS)]
