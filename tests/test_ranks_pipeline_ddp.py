"""Pipelines whose stages are DDP modules: messages between stages and gradients between copies are both compressed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_pipeline import BATCH, CHUNKS, WIDTH, Block, batch, loss_of

pytestmark = pytest.mark.distributed


def trained(rank: int, world_size: int, is_static: bool) -> tuple[int, list[str], list[tuple[str, str]], tuple[str, ...]]:
    """Trains 2 x 2 ranks. Returns the stage, digests of its parameters at each step, the report's kinds and decisions, and its notes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "stages"))
    copies, stages = (mesh[name].get_group() for name in ("copies", "stages"))
    index = stages.rank()
    module = DistributedDataParallel(torch.compile(Block(index), backend=dct), process_group=copies)
    example = torch.empty(BATCH // CHUNKS, WIDTH)
    shapes: dict[str, Any] = {"input_args": example.clone().requires_grad_(index > 0), "output_args": example.clone().requires_grad_()}
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=stages, **(shapes if is_static else {}))
    schedule = Schedule1F1B(stage, CHUNKS, loss_fn=loss_of)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    digests = []
    for step in range(4):
        x, target = batch(2 * step + copies.rank())
        schedule.step(*[x] * stage.is_first, target=target)
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(module.parameters()))
    dist.barrier()
    report = dct_compile.report()
    return index, digests, [(site.kind, site.decision) for site in report.sites], report.notes


@pytest.mark.parametrize("is_static", [False, True])
def test_stages_and_copies_compress_alike(ranks4: Ranks, is_static: bool) -> None:
    """``is_static``: the shapes are given, so that no forward runs before the first microbatch."""
    results = ranks4(trained, is_static)
    for index, message in enumerate(("activation", "activation_gradient")):
        (first, second) = [(digests, sites) for stage, digests, sites, _ in results if stage == index]
        assert first == second
        assert len(set(first[0])) == 4
        assert sorted(first[1]) == [(message, "compressed"), ("gradient", "compressed")]
    assert [notes for *_, notes in results] == [()] * 4
