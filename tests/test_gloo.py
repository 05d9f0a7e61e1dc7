"""`workarounds.gloo` against a data race in torch's gloo groups."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dct_compile.backend
from dct_compile.workarounds.gloo import shorten_names
from tests.processes import run_python
from tests.ranks import fresh_compiler

c10d = torch.ops._c10d_functional

# Without `shorten_names` this aborts within the first thousands.
TWO_KINDS_AT_A_TIME = """
import torch, torch.distributed as dist
from dct_compile.workarounds.gloo import shorten_names

shorten_names()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
name, c10d, x = dist.group.WORLD.group_name, torch.ops._c10d_functional, torch.ones(2)
for _ in range(2000):
    started = []
    for _ in range(20):
        started += [c10d.all_to_all_single(x, [2], [2], name), c10d.all_gather_into_tensor(x, 1, name)]
    for result in started:
        assert torch.equal(c10d.wait_tensor(result), x)
"""


def test_collectives_of_two_kinds_that_end_together_leave_the_heap_intact() -> None:
    run_python(TWO_KINDS_AT_A_TIME)


@pytest.mark.parametrize(
    "x", [torch.arange(6.0).view(2, 3), torch.arange(6).view(2, 3).t(), torch.ones(5, dtype=torch.uint8), torch.ones(0, 4)]
)
def test_a_gather_by_its_short_name_is_the_same(group_of_one: dist.ProcessGroup, x: torch.Tensor) -> None:
    shorten_names()
    with torch.profiler.profile() as profile:
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 1, group_of_one.group_name))
    assert torch.equal(gathered, x)
    assert gathered.dtype == x.dtype
    assert gathered.is_contiguous()
    names = {event.key for event in profile.key_averages()}
    assert "c10d::_allgather_base_" in names
    assert "c10d::allgather_into_tensor_coalesced_" not in names


@pytest.mark.usefixtures("group_of_one")
def test_the_backend_sees_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dct_compile.backend.gloo, "shorten_names", lambda: calls.append("called"))
    with fresh_compiler():
        torch.compile(nn.Linear(2, 2), backend="dct")(torch.ones(1, 2))
    assert calls
