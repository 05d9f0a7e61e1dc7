"""A NaN or an infinity in the gradient of one rank: all ranks see it, and no residual is lost."""

from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_stack import batch, stack

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "in graph"]),
    pytest.mark.parametrize("bad", ["nan", "inf"]),
    pytest.mark.parametrize("scheme", ["gather", "owner"]),
]
BAD_STEP, BAD_RANK = 3, 1


class Outcome(NamedTuple):
    """``skipped``: steps whose gradients are not finite. ``kept``: whether residuals and owners' residuals outlived each of these.

    ``finite``: whether all residuals are, in the end. ``parameters``: their digest.
    """

    skipped: list[int]
    kept: list[tuple[bool, bool]]
    finite: bool
    parameters: str


def poisoned(rank: int, world_size: int, scheme: str, bad: str, ddp: bool) -> Outcome:
    model = stack(seed=0)
    options = {"dp_density": 0.05, "gradient_scheme": scheme, "data_parallel": not ddp}
    compiled = torch.compile(DistributedDataParallel(model) if ddp else model, backend=dct, options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    skipped, kept = [], []
    for step in range(6):
        x = batch(rank, step)
        if (step, rank) == (BAD_STEP, BAD_RANK):
            x[0, 0] = float(bad)
        before = dct_compile.state_dict(model)
        compiled(x).square().mean().backward()
        if all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters()):
            optimizer.step()
        else:
            skipped.append(step)
            kept.append(are_close(before, dct_compile.state_dict(model)))
        optimizer.zero_grad()
    finite = all(bool(entry["residual"].isfinite().all()) for entry in dct_compile.state_dict(model).values())
    return Outcome(skipped, kept, finite, digest(model.parameters()))


def are_close(before: dict[str, Any], after: dict[str, Any]) -> tuple[bool, bool]:
    """Compares residuals and owners' residuals, but for one rounding: the gradient was added to them, and taken out again."""
    stages = [(before[name], after[name]) for name in before]
    owners = [(old["owner"], new["owner"]) for old, new in stages if "owner" in old]
    same = [all(torch.allclose(old["residual"], new["residual"], atol=1e-6) for old, new in pairs) for pairs in (stages, owners)]
    return same[0], same[1]


def test_all_ranks_see_it_in_its_step_only(ranks2_once: Ranks, scheme: str, bad: str, ddp: bool) -> None:
    for result in ranks2_once(poisoned, scheme, bad, ddp):
        assert result.skipped == [BAD_STEP]


def test_the_rank_that_has_it_keeps_its_residuals(ranks2_once: Ranks, scheme: str, bad: str, ddp: bool) -> None:
    assert ranks2_once(poisoned, scheme, bad, ddp)[BAD_RANK].kept == [(True, True)]


def test_every_residual_stays_finite(ranks2_once: Ranks, scheme: str, bad: str, ddp: bool) -> None:
    assert all(result.finite for result in ranks2_once(poisoned, scheme, bad, ddp))


def test_parameters_stay_equal(ranks2_once: Ranks, scheme: str, bad: str, ddp: bool) -> None:
    first, second = ranks2_once(poisoned, scheme, bad, ddp)
    assert first.parameters == second.parameters
