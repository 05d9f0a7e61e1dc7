"""``dct_compile.monitor`` on gloo ranks: compiled graphs and DDP's buckets are watched while a model trains."""

from typing import Any, NamedTuple

import pytest
import torch

import dct_compile
from dct_compile.backend import dct
from dct_compile.monitor import SiteStats
from tests.rank_pool import Ranks
from tests.ranks_ddp import Exchanging, Net, batch, ddp_of, loss_of

pytestmark = pytest.mark.distributed
both_ways = pytest.mark.parametrize("how", ["in graph", "ddp"])


class Outcome(NamedTuple):
    """``news``: of each step, whether it read the numbers."""

    sites: tuple[SiteStats, ...]
    news: list[bool]
    summary: dict[str, float]


def watched(rank: int, world_size: int, how: str) -> Outcome:
    if how == "ddp":
        _, compiled = ddp_of(Net(), {"dp_density": 0.05}, inside=False)
    else:
        compiled: Any = torch.compile(Exchanging(), backend=dct, options={"data_parallel": True, "dp_density": 0.05})
    news = []
    with dct_compile.monitor(every=4) as monitor:
        for step in range(8):
            loss_of(compiled(batch(rank, step))).backward()
            news.append(monitor.step())
        return Outcome(monitor.sites, news, monitor.summary())


@both_ways
def test_every_fourth_step_is_read(ranks2_once: Ranks, how: str) -> None:
    for result in ranks2_once(watched, how):
        assert result.news == [False, False, False, True] * 2


@both_ways
def test_gradients_numbers_are_those_of_four_steps(ranks2_once: Ranks, how: str) -> None:
    for result in ranks2_once(watched, how):
        (gradient,) = (site for site in result.sites if site.kind == "gradient")
        assert gradient.steps == 4
        assert gradient.density == pytest.approx(0.05, rel=0.15)
        assert gradient.residual_norm is not None
        assert gradient.residual_norm > 0
        assert 0 < (gradient.threshold or 0) < float("inf")
        assert gradient.bytes_sent == 4 * gradient.wire_bytes


@both_ways
def test_the_summary_is_of_the_gradients(ranks2_once: Ranks, how: str) -> None:
    for result in ranks2_once(watched, how):
        (gradient,) = (site for site in result.sites if site.kind == "gradient")
        assert result.summary["density"] == gradient.density
        assert result.summary["compression"] > 1


def test_exchanges_show_their_bytes(ranks2_once: Ranks) -> None:
    for result in ranks2_once(watched, "in graph"):
        exchanges = [site for site in result.sites if site.kind != "gradient"]
        assert [(site.kind, site.dense_bytes, site.wire_bytes, site.density) for site in exchanges] == [
            ("activation", 1024, 48, None),
            ("activation_gradient", 1024, 32, None),
        ]
