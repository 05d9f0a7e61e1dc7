"""What ``explain`` foresees before a training on real ranks is what the training's report says."""

from typing import Any

import pytest
import torch

import dct_compile
from dct_compile.report import Report
from tests.ranks import fresh_compiler, run_ranks
from tests.ranks_ddp import Net, batch, ddp_of, train

OPTIONS = {"dp_density": 0.05, "min_numel": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "buckets": {"bucket_cap_mb": 0.004},
    "unused": {"find_unused_parameters": True},
}


def gradients(report: Report) -> list[tuple[Any, ...]]:
    """DDP's buckets. The order of their parameters is that of their gradients, which only a backward shows."""
    sites = [site for site in report.sites if site.kind == "gradient"]
    return [(sorted(site.name.split(", ")), site.shape, site.decision, site.dense_bytes, site.wire_bytes) for site in sites]


def total(buckets: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All buckets as one."""
    names, shapes, decisions, dense, wire = zip(*buckets, strict=True)
    return sorted(name for bucket in names for name in bucket), sum(shape[0] for shape in shapes), set(decisions), sum(dense), sum(wire)


def scenarios(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, given in SETTINGS.items():
        for explained in (False, True) if name == "buckets" else (True,):
            with fresh_compiler(), torch._dynamo.config.patch(optimize_ddp=False):
                module, compiled = ddp_of(Net(), OPTIONS, inside=False, **given)
                looks = explained and (rank == 0 or name != "unused")  # a rank may look on its own
                foreseen = gradients(dct_compile.explain(module, batch(rank, 0), options=OPTIONS)) if looks else None
                digests = train(module, compiled, rank, range(4))
                results[f"{name}, {explained}"] = foreseen, gradients(dct_compile.report()), digests
    return results


@pytest.mark.distributed
def test_training_is_foreseen_and_not_changed() -> None:
    for rank, results in enumerate(run_ranks(scenarios, 2)):
        for name in SETTINGS:
            foreseen, found, digests = results[f"{name}, True"]
            assert (foreseen is None) == (rank == 1 and name == "unused")
            assert foreseen is None or total(foreseen) == total(found), name
            assert (len(found) > 1) == (name == "buckets"), name
            if name == "buckets":
                assert digests == results[f"{name}, False"][2]
        assert results["one bucket, True"][0] == results["one bucket, True"][1]
