"""Ranks that would compress differently must all stop with the reason: their payloads would not fit together."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dct_compile.backend import dct
from tests.ranks import fresh_compiler, run_ranks


class Exchange(nn.Module):
    def __init__(self, width: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.linear, self.group = nn.Linear(16, width), group

    def forward(self, x: Tensor) -> Tensor:
        return funcol.all_to_all_single_autograd(torch.relu(self.linear(x)), None, None, self.group)


class Layer(nn.Module):
    """A module of the user's own: Dynamo compiles no frame of torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def attempt(rank: int, kind: str, own: dict[str, Any]) -> tuple[str, float]:
    """The error, and after how many seconds it came. A fresh group for each attempt: groups that agreed are not asked again."""
    group = dist.new_group([0, 1])
    width = own.pop("width", 64)
    x = torch.randn(8, 16)
    with fresh_compiler():
        dist.barrier()
        started = time.monotonic()
        try:
            if kind == "ddp":
                module = DistributedDataParallel(Layer(width), process_group=group)
                torch.compile(module, backend=dct, options=own)(x).sum().backward()
            elif kind == "data_parallel":
                torch.compile(Layer(width), backend=dct, options={"data_parallel": group, **own})(x).sum().backward()
            else:
                torch.compile(Exchange(width, group), backend=dct, options=own)(x).sum().backward()
        except Exception as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "no error", time.monotonic() - started


CASES = {
    "dp_density": ("ddp", {"dp_density": 0.01}, {"dp_density": 0.02}),
    "refresh_interval": ("ddp", {}, {"refresh_interval": 10}),
    "mp_density": ("exchange", {"mp_density": 0.05}, {"mp_density": 0.1}),
    "dp_value_dtype": ("data_parallel", {}, {"dp_value_dtype": "float32"}),
    "mp_value_dtype": ("exchange", {}, {"mp_value_dtype": "float16"}),
    "site 0": ("exchange", {"width": 64}, {"width": 80}),
    "site": ("data_parallel", {"width": 64}, {"width": 80}),
}


def disagree(rank: int, world_size: int) -> dict[str, tuple[str, float]]:
    results = {name: attempt(rank, kind, dict((first, second)[rank])) for name, (kind, first, second) in CASES.items()}
    results["agree"] = attempt(rank, "exchange", {})
    return results


@pytest.mark.distributed
def test_every_rank_names_what_differs_and_none_hangs() -> None:
    for rank, results in enumerate(run_ranks(disagree, 2)):
        for name in CASES:
            error, seconds = results[name]
            assert "would compress differently" in error, (rank, name, error)
            assert name in error
            assert f"ranks {rank} and {1 - rank}" in error
            assert seconds < 30
        assert results["agree"][0] == "no error"
