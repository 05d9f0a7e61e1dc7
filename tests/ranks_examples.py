"""Trains an example on a rank of a pool, dense and compressed."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import dct_compile
from tests.sockets import sent_bytes

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 200


class Trained(NamedTuple):
    """``measured``: bytes that the sockets have sent in all steps. ``dense``, ``wire``: bytes per step by the report."""

    loss: float
    measured: int
    dense: int
    wire: int
    messages: int
    copies: dict[str, torch.Tensor]
    report: str


DENSE = {
    "dp_density": 1.0,
    "activation_codec": "dense",
    "embedding_codec": "dense",
    "parameter_codec": "dense",
    "sharded_gradients": "dense",
}


def trained(rank: int, world_size: int, name: str, options: dict[str, Any]) -> Trained:
    """Returns what came of the example. ``copies``: the parameters that are no shards, by name."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    dist.barrier()
    start = sent_bytes()
    loss, model = import_module(name).train({"link": None, **options}, STEPS)
    dist.barrier()
    measured = sent_bytes() - start
    report = dct_compile.report()
    copies = {name: value.detach() for name, value in model.named_parameters() if not isinstance(value, DTensor)}
    return Trained(loss, measured, report.dense_bytes, report.wire_bytes, len(report.sites), copies, str(report))
