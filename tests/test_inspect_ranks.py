"""``explain`` foresees before a training on real ranks what the training's report will say."""

from typing import Any, NamedTuple

import pytest
import torch

import dct_compile
from dct_compile.report import Report
from tests.rank_pool import Ranks
from tests.ranks_ddp import SMALL_BUCKETS, Net, batch, ddp_of, train

pytestmark = pytest.mark.distributed

OPTIONS = {"dp_density": 0.05, "min_numel": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "buckets": {"bucket_cap_mb": SMALL_BUCKETS},
    "unused": {"find_unused_parameters": True},
}


def gradients(report: Report) -> list[tuple[Any, ...]]:
    """Returns DDP's buckets. The order of their parameters is that of their gradients, which only a backward shows."""
    sites = [site for site in report.sites if site.kind == "gradient"]
    return [(sorted(site.name.split(", ")), site.shape, site.decision, site.dense_bytes, site.wire_bytes) for site in sites]


def total(buckets: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Adds up all buckets."""
    names, shapes, decisions, dense, wire = zip(*buckets, strict=True)
    return sorted(name for bucket in names for name in bucket), sum(shape[0] for shape in shapes), set(decisions), sum(dense), sum(wire)


class Outcome(NamedTuple):
    """Gradients' sites as foreseen (``None`` where nobody looked) and as found, and digests of the parameters at every step."""

    foreseen: list[tuple[Any, ...]] | None
    found: list[tuple[Any, ...]]
    digests: list[str]


def trained(rank: int, world_size: int, name: str, looking: tuple[int, ...]) -> Outcome:
    """Trains; the ranks ``looking`` explain the model before."""
    with torch._dynamo.config.patch(optimize_ddp=False):
        module, compiled = ddp_of(Net(), OPTIONS, inside=False, **SETTINGS[name])
        looks = rank in looking
        foreseen = gradients(dct_compile.explain(module, batch(rank, 0), options=OPTIONS)) if looks else None
        digests = train(module, compiled, rank, range(4))
        return Outcome(foreseen, gradients(dct_compile.report()), digests)


@pytest.mark.parametrize(("name", "looking"), [("one bucket", (0, 1)), ("buckets", (0, 1)), ("unused", (0,))])
def test_training_is_foreseen(ranks2_once: Ranks, name: str, looking: tuple[int, ...]) -> None:
    """A rank may look on its own."""
    for rank, result in enumerate(ranks2_once(trained, name, looking)):
        assert (result.foreseen is not None) == (rank in looking)
        assert result.foreseen is None or total(result.foreseen) == total(result.found)
        assert (len(result.found) > 1) == (name == "buckets")


def test_one_bucket_is_foreseen_to_the_letter(ranks2_once: Ranks) -> None:
    for result in ranks2_once(trained, "one bucket", (0, 1)):
        assert result.foreseen == result.found


def test_looking_does_not_change_the_training(ranks2_once: Ranks) -> None:
    explained, unexplained = (ranks2_once(trained, "buckets", looking) for looking in ((0, 1), ()))
    assert [result.digests for result in explained] == [result.digests for result in unexplained]
