"""Ranks that would compress differently must all stop with the reason: their payloads would not fit together."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks_ddp import Part
from tests.small_models import exchange

pytestmark = pytest.mark.distributed


class Exchange(nn.Module):
    def __init__(self, width: int, returned: bool = False) -> None:
        super().__init__()
        self.linear, self.returned = nn.Linear(16, width), returned

    def forward(self, x: Tensor) -> Tensor:
        exchanged = exchange(torch.relu(self.linear(x)))
        return exchanged if self.returned else exchanged.sin()


def attempt(rank: int, world_size: int, kind: str, options: list[dict[str, Any]], widths: tuple[int, int]) -> tuple[str, float]:
    """Returns the error under this rank's options and width, and after how many seconds it came."""
    own, width = options[rank], widths[rank]
    if kind == "ddp":
        compiled: Any = torch.compile(DistributedDataParallel(Part(nn.Linear(16, width))), backend=dct, options=own)
    elif kind == "data_parallel":
        compiled = torch.compile(Part(nn.Linear(16, width)), backend=dct, options={"data_parallel": True, **own})
    else:
        compiled = torch.compile(Exchange(width, kind == "returned"), backend=dct, options=own)
    dist.barrier()
    started = time.monotonic()
    try:
        compiled(torch.randn(8, 16)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "no error", time.monotonic() - started


CASES = {
    "dp_density": ("ddp", [{"dp_density": 0.01}, {"dp_density": 0.02}], (64, 64)),
    "refresh_interval": ("ddp", [{}, {"refresh_interval": 10}], (64, 64)),
    "mp_density": ("exchange", [{"mp_density": 0.05}, {"mp_density": 0.1}], (64, 64)),
    "exempt": ("exchange", [{}, {"exempt": ["small_models.py:*"]}], (64, 64)),
    "mp_outputs": ("returned", [{}, {"mp_outputs": True}], (64, 64)),
    "dp_value_dtype": ("data_parallel", [{}, {"dp_value_dtype": "float32"}], (64, 64)),
    "mp_value_dtype": ("exchange", [{}, {"mp_value_dtype": "float16"}], (64, 64)),
    "site 0": ("exchange", [{}, {}], (64, 80)),
    "site": ("data_parallel", [{}, {}], (64, 80)),
}
"""By the words that the error holds."""


@pytest.mark.parametrize("name", CASES)
def test_every_rank_names_what_differs_and_none_hangs(ranks2: Ranks, name: str) -> None:
    for rank, (error, seconds) in enumerate(ranks2(attempt, *CASES[name])):
        assert "would compress differently" in error
        assert name in error
        assert f"ranks {rank} and {1 - rank}" in error
        assert seconds < 30


def test_ranks_that_agree_go_on(ranks2: Ranks) -> None:
    assert [error for error, _ in ranks2(attempt, "exchange", [{}, {}], (64, 64))] == ["no error"] * 2
