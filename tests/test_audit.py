"""An audit without ranks: where its messages lie."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dct_compile
from tests.tracing import fake_group


def test_messages_lie_where_the_parameters_do() -> None:
    """A group of NCCL alone takes nothing else. The tensors are fake ones on a CUDA device, whose values nobody can read."""
    devices: set[torch.device] = set()

    def collective(*args: Any, **_: Any) -> None:
        devices.update(item.device for item in pytree.tree_leaves(args) if isinstance(item, Tensor))

    moves = {name: mock.Mock(side_effect=collective) for name in ("all_reduce", "all_gather", "broadcast")}
    reads = [mock.patch.object(Tensor, "item", return_value=0), mock.patch.object(torch, "equal", return_value=True)]
    with fake_group(2), FakeTensorMode(), mock.patch.multiple(dist, **moves), reads[0], reads[1]:
        model = nn.ParameterList([nn.Parameter(torch.empty(4, 4, device="cuda"))])
        with dct_compile.audit(model) as audit:
            audit.check()
    assert all(move.called for move in moves.values())
    assert {device.type for device in devices} == {"cuda"}
