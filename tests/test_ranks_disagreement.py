"""Ranks that would compress differently must all stop with the reason: their payloads would not fit together."""

import gc
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from dct_compile.backend import dct
from tests.rank_pool import GROUP_TIMEOUT, Ranks
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
    "start_iter": ("ddp", [{"start_iter": 2}, {"start_iter": 3}], (64, 64)),
    "density_warmup": ("data_parallel", [{"density_warmup": 2}, {"density_warmup": 20}], (64, 64)),
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


def attempts(rank: int, world_size: int, new_life: bool) -> list[str]:
    """Returns the errors of three DDP models, one after the other: equal options, other values on each rank, other densities.

    ``new_life``: each has a process group of its own, which has the store and the name of the one before.
    """
    base, errors = _get_default_store(), []
    for number, name in enumerate((None, "dp_value_dtype", "dp_density")):
        if new_life:
            dist.barrier()  # the other rank may still connect
            dist.destroy_process_group()
            gc.collect()
            store = PrefixStore(f"life {number}", base)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
        values = {"dp_value_dtype": ["bfloat16", "float16"][rank], "dp_density": [0.01, 0.05][rank]}
        torch._dynamo.reset()
        errors.append(attempt(rank, world_size, "ddp", [{name: values[name]} if name else {}] * 2, (64, 64))[0])
    return errors


@pytest.mark.parametrize("new_life", [False, True])
def test_each_model_of_a_group_is_compared(ranks2: Ranks, new_life: bool) -> None:
    for first, second, third in ranks2(attempts, new_life):
        assert first == "no error"
        assert "would compress differently" in second
        assert "option 'dp_value_dtype'" in second
        assert "option 'dp_density'" in third
