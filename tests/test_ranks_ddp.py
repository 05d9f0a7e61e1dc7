"""DistributedDataParallel over gloo ranks: wrapping orders, buckets, unused and frozen parameters, each audited at every step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.rank_pool import Ranks
from tests.ranks_audit import Auditor
from tests.ranks_ddp import SMALL_BUCKETS, Net, Options, Outcome, ddp_of, outcome, train

pytestmark = pytest.mark.distributed

DENSITY = 0.05
WEIGHTS = ["bottom.weight", "middle.weight", "side.weight", "top.weight"]


@dataclass(frozen=True)
class Training:
    """``arguments``: of the model, by rank and step, behind the batch. ``settings``: of DDP. ``state``: the parameters that have some."""

    options: Options = field(default_factory=dict)
    inside: bool = True
    model: Callable[[], nn.Module] = Net
    arguments: Callable[[int, int], tuple[Any, ...]] = lambda rank, step: ()
    settings: dict[str, Any] = field(default_factory=dict)
    state: list[str] = field(default_factory=lambda: WEIGHTS)


def frozen() -> nn.Module:
    model = Net()
    model.middle.requires_grad_(False)
    return model


BUCKETS = {"bucket_cap_mb": SMALL_BUCKETS}
TRAININGS = {
    "gather around": Training({"gradient_scheme": "gather"}, inside=False),
    "gather inside": Training({"gradient_scheme": "gather"}),
    "gather buckets": Training({"gradient_scheme": "gather"}, settings=BUCKETS),
    "owner around": Training({"gradient_scheme": "owner"}, inside=False),
    "owner inside": Training({"gradient_scheme": "owner"}),
    "owner buckets": Training({"gradient_scheme": "owner"}, settings=BUCKETS),
    "views": Training(settings={"gradient_as_bucket_view": True, **BUCKETS}),
    "static": Training(settings={"static_graph": True}),
    "graph split at buckets": Training({"min_numel": 2000}, inside=False, model=lambda: Net(width=512), settings={"bucket_cap_mb": 1}),
    "frozen": Training(model=frozen, state=[name for name in WEIGHTS if name != "middle.weight"]),
    "exempt": Training({"exempt": ["top.*", "side.weight"]}, state=WEIGHTS[:2]),
    "unused on one rank": Training(
        inside=False,
        arguments=lambda rank, step: (step % 2 == 0 or rank == 0,),
        settings={"find_unused_parameters": True, **BUCKETS},
    ),
    "never used": Training(arguments=lambda rank, step: (False,), settings={"find_unused_parameters": True}),
}


def audited(rank: int, world_size: int, name: str) -> Outcome:
    training = TRAININGS[name]
    small = training.settings.get("bucket_cap_mb", 25) < 1
    with torch._dynamo.config.patch(optimize_ddp=not small):
        options = {"dp_density": DENSITY, "dp_value_dtype": "float32", **training.options}
        module, compiled = ddp_of(training.model(), options, training.inside, **training.settings)
        auditor = Auditor(module, DENSITY, torch.float32)
        digests = train(module, compiled, rank, range(6), auditor, arguments=lambda step: training.arguments(rank, step))
        auditor.finish()
        return outcome(module, digests)


@pytest.mark.parametrize("name", TRAININGS)
def test_invariants_hold_and_the_ranks_parameters_are_equal(ranks2_once: Ranks, name: str) -> None:
    first, second = ranks2_once(audited, name)
    assert first.digests == second.digests


@pytest.mark.parametrize("name", TRAININGS)
def test_every_bucket_is_compressed(ranks2_once: Ranks, name: str) -> None:
    first, _ = ranks2_once(audited, name)
    assert {decision for decision, _ in first.decisions} == {"compressed"}, first.decisions


@pytest.mark.parametrize("name", TRAININGS)
def test_weights_that_are_compressed_have_state(ranks2_once: Ranks, name: str) -> None:
    first, _ = ranks2_once(audited, name)
    assert first.state == TRAININGS[name].state


@pytest.mark.parametrize("name", ["gather buckets", "owner buckets", "graph split at buckets"])
def test_small_buckets_are_several(ranks2_once: Ranks, name: str) -> None:
    first, _ = ranks2_once(audited, name)
    assert len(first.decisions) > 1


@pytest.mark.parametrize("scheme", ["gather", "owner"])
def test_neither_the_order_of_wrapping_nor_the_buckets_change_what_a_parameter_sends(ranks2_once: Ranks, scheme: str) -> None:
    around, inside, buckets = (ranks2_once(audited, f"{scheme} {how}")[0].digests for how in ("around", "inside", "buckets"))
    assert around == inside == buckets


@pytest.mark.parametrize("name", ["views", "static"])
def test_bucket_views_and_static_graphs_change_nothing(ranks2_once: Ranks, name: str) -> None:
    assert ranks2_once(audited, name)[0].digests == ranks2_once(audited, "gather inside")[0].digests
