"""When option ``data_parallel`` makes parameters equal, and what it says where the ranks do not meet."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_stack import batch, stack

pytestmark = pytest.mark.distributed

TIMEOUT_S = 6.0


class Branches(nn.Module):
    """Two layers, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor, wide: bool) -> Tensor:
        return self.wide(x) if wide else self.narrow(x)


class Flat(nn.Module):
    """One parameter of 1024 elements, ``shape`` of which the forward does not depend on."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.stage = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.stage.view(32, 32)


def evaluated_first(rank: int, world_size: int) -> tuple[bool, list[str]]:
    """Evaluates on rank 0 alone, then trains. Returns whether that took the rank's own values, and digests of the parameters."""
    model = stack(seed=rank + 1)
    compiled = torch.compile(model, backend=dct, options={"data_parallel": True})
    own = True
    if rank == 0:
        with torch.no_grad():
            expected = model(batch(0, 0))
            own = torch.allclose(compiled(batch(0, 0)), expected)
    before = digest(model.parameters())
    dist.barrier()
    compiled(batch(rank, 0)).sum().backward()
    return own, [before, digest(model.parameters())]


def test_one_rank_may_evaluate_before_the_first_step(ranks2: Ranks) -> None:
    (own, first), (_, second) = ranks2(evaluated_first)
    assert own
    assert first[0] == first[1] == second[1]
    assert second[0] != second[1]


def evaluated_by_all(rank: int, world_size: int) -> list[str]:
    model = stack(seed=rank)
    compiled = torch.compile(model, backend=dct, options={"data_parallel": True})
    digests = [digest(model.parameters())]
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            compiled(batch(rank, 0))
        digests.append(digest(model.parameters()))
    return digests


def test_an_evaluation_changes_no_parameter(ranks2: Ranks) -> None:
    first, second = ranks2(evaluated_by_all)
    assert second[0] == second[1] != second[2]
    assert [first[0]] * 3 == first
    assert first[2] == second[2]


def frozen(rank: int, world_size: int) -> str:
    model = stack(seed=rank)
    model[0].requires_grad_(False)
    torch.compile(model, backend=dct, options={"data_parallel": True})(batch(rank, 0)).sum().backward()
    return digest(model[0].parameters())


def test_frozen_parameters_are_made_equal(ranks2: Ranks) -> None:
    first, second = ranks2(frozen)
    assert first == second


def alone(rank: int, world_size: int) -> tuple[str, float]:
    """Runs a forward with gradients enabled on rank 0 only. Returns the error, and the seconds that it took."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT_S))
    compiled = torch.compile(Branches(), backend=dct, options={"data_parallel": group})
    started, error = time.monotonic(), "no error"
    if rank == 0:
        try:
            compiled(torch.randn(8, 32), True)
        except RuntimeError as raised:
            error = str(raised)
    return error, time.monotonic() - started


def test_a_forward_on_one_rank_ends_with_the_group_s_timeout(ranks2: Ranks) -> None:
    (error, seconds), _ = ranks2(alone)
    assert "'wide.weight' (parameter float32 [64, 32])" in error
    assert f"waited {TIMEOUT_S:g} s for rank 1, which did not come" in error
    assert "Run a forward of one rank alone under torch.no_grad()" in error
    assert seconds < 40


def differing(rank: int, world_size: int, how: str) -> tuple[str, bool]:
    """Returns the error, and whether the parameters are as before."""
    model: nn.Module = Branches() if how == "branches" else Flat(32, 32) if rank == 0 else Flat(16, 64)
    arguments = (rank == 0,) if how == "branches" else ()
    before = digest(model.parameters())
    error = "no error"
    try:
        torch.compile(model, backend=dct, options={"data_parallel": True})(torch.randn(8, 32), *arguments)
    except RuntimeError as raised:
        error = str(raised)
    return error, digest(model.parameters()) == before


WORDS = {
    "branches": ("'wide.weight' (parameter float32 [64, 32]", "'narrow.weight' (parameter float32 [16, 32]"),
    "stages": ("'stage' (parameter float32 [32, 32]", "'stage' (parameter float32 [16, 64]"),
}


@pytest.mark.parametrize("how", WORDS)
def test_parameters_of_other_shapes_are_an_error_before_any_is_sent(ranks2: Ranks, how: str) -> None:
    for error, unchanged in ranks2(differing, how):
        for words in (*WORDS[how], "such as a stage of a pipeline or an expert"):
            assert words in error
        assert unchanged
