"""The set of DDP's buckets changes while a model trains: one parameter keeps one residual, and nothing is lost."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import dct_compile
from tests.rank_pool import Ranks
from tests.ranks_balance import Balance, wrap
from tests.ranks_ddp import SMALL_BUCKETS, Net

pytestmark = pytest.mark.distributed

WEIGHTS = ["bottom.weight", "middle.weight", "side.weight", "top.weight"]
OPTIONS: dict[str, dict[str, Any]] = {
    scheme: {"gradient_scheme": scheme, "dp_density": 0.05, "dp_value_dtype": "float32"} for scheme in ("gather", "owner")
}


@dataclass(frozen=True)
class Phase:
    """``lost``: the largest element that was lost. ``state``: the names in the state. ``frozen``: the residual of the layer in between."""

    digests: list[str]
    lost: float
    state: list[str]
    frozen: list[float]


def changed(rank: int, world_size: int, scheme: str, other: str) -> dict[str, Phase]:
    """Trains on with other buckets, then with a frozen layer, with all layers again, and with a DDP module of before."""
    model = Net()
    balance = Balance(model)
    phases: dict[str, Phase] = {}
    steps = iter(range(100))

    def train(name: str, module: torch.nn.Module) -> None:
        start = next(steps)
        digests = balance.train(module, rank, range(3 * start, 3 * start + 3))
        state = dct_compile.state_dict(model)
        phases[name] = Phase(digests, balance.lost(state), sorted(state), state["middle.weight"]["residual"].tolist())

    first = wrap(model, OPTIONS[scheme], bucket_cap_mb=SMALL_BUCKETS)
    train("rebuilt", first)
    train("one bucket", wrap(model, OPTIONS[scheme]))
    model.middle.requires_grad_(False)
    train("frozen", wrap(model, OPTIONS[other], bucket_cap_mb=SMALL_BUCKETS))
    model.middle.requires_grad_(True)
    second = wrap(model, OPTIONS[scheme])
    train("unfrozen", second)
    train("the first again", first)
    train("the second again", second)
    return phases


CASES = [("gather", "gather"), ("owner", "owner"), ("gather", "owner"), ("owner", "gather")]


@pytest.fixture(scope="module", params=[(2, *CASES[0]), (2, *CASES[1]), (2, *CASES[2]), (3, *CASES[3])], ids=str)
def results(request: pytest.FixtureRequest, ranks2: Ranks, ranks3: Ranks) -> list[dict[str, Phase]]:
    size, scheme, other = request.param
    return {2: ranks2, 3: ranks3}[size](changed, scheme, other)


def test_nothing_is_lost(results: list[dict[str, Phase]]) -> None:
    for phases in results:
        assert max(phase.lost for phase in phases.values()) < 1e-6, {name: phase.lost for name, phase in phases.items()}


def test_a_parameter_has_one_state(results: list[dict[str, Phase]]) -> None:
    for phases in results:
        for phase in phases.values():
            assert phase.state == WEIGHTS


def test_the_residual_of_a_frozen_layer_waits(results: list[dict[str, Phase]]) -> None:
    for phases in results:
        waiting = phases["one bucket"].frozen
        assert any(waiting)
        assert phases["frozen"].frozen == waiting
        assert phases["unfrozen"].frozen != waiting


def test_the_ranks_parameters_are_equal(results: list[dict[str, Phase]]) -> None:
    for phases in results:
        assert {name: phase.digests for name, phase in phases.items()} == {name: phase.digests for name, phase in results[0].items()}
