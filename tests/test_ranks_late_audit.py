"""The audit of gradients that arrive one step later: nothing is lost, before and after what is under way was handed back."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import dct_compile
from tests.audited_trainings import Setting
from tests.rank_pool import Ranks
from tests.test_ranks_audit import EVERYWHERE, UNDER_DDP

pytestmark = pytest.mark.distributed
SCHEMES = ("gather", "owner", "powersgd", "random_k")
PHASES = {"start_iter": 2, "density_warmup": {0: 0.25, 2: 0.02}}
WRAPPINGS = ("inside", "outside")
CASES = [(name, SCHEMES[i % 2], WRAPPINGS[i // 2 % 2]) for i, name in enumerate(EVERYWHERE | UNDER_DDP)]


def audited(rank: int, world_size: int, name: str, scheme: str, wrapping: str, phases: bool = False) -> list[tuple[int, int, bool]]:
    """Returns for each model its steps, the number of its compressed parameters, and whether a late mean was under way at the end."""
    training, make = (EVERYWHERE | UNDER_DDP)[name]
    torch.manual_seed(0)
    options = {"gradient_scheme": scheme, "dp_density": 0.02, "arrival": "late", **(PHASES if phases else {})}
    with ExitStack() as stack:
        audits = [(net, stack.enter_context(dct_compile.audit(net))) for net in training(make(), Setting(rank, wrapping, options))]
        return [check(net, audit) for net, audit in audits]


def check(net: torch.nn.Module, audit: dct_compile.Audit) -> tuple[int, int, bool]:
    result = audit.check()
    waited = late(net)
    dct_compile.drain(net)
    assert audit.check().compressed == result.compressed
    assert not late(net)
    return result.steps, len(result.compressed), waited


def late(net: torch.nn.Module) -> bool:
    found: list[Any] = [entry["late"].any() for entry in dct_compile.state_dict(net).values() if "late" in entry]
    return any(found)


@pytest.mark.parametrize(("name", "scheme", "wrapping"), CASES)
def test_nothing_is_lost(ranks2: Ranks, name: str, scheme: str, wrapping: str) -> None:
    for steps, compressed, waited in ranks2(audited, name, scheme, wrapping)[0]:
        assert steps >= 3
        assert compressed >= 1
        assert waited == (name != "unused parameters")


@pytest.mark.parametrize("scheme", ["powersgd", "random_k"])
@pytest.mark.parametrize("name", ["GAN", "loss scale"])
def test_other_schemes_lose_nothing(ranks2: Ranks, name: str, scheme: str) -> None:
    assert all(waited for _, _, waited in ranks2(audited, name, scheme, "inside")[0])


@pytest.mark.parametrize("name", ["GAN", "skipped batches"])
def test_nothing_is_lost_on_three_ranks(ranks3: Ranks, name: str) -> None:
    assert all(waited for _, _, waited in ranks3(audited, name, "owner", "outside")[0])


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_nothing_is_lost_between_phases(ranks2: Ranks, wrapping: str) -> None:
    assert all(waited for _, _, waited in ranks2(audited, "GAN", "gather", wrapping, True)[0])
