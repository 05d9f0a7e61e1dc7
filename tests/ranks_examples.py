"""Trains examples on the ranks of a pool, dense and compressed, and compares: loss, bytes, copies of parameters."""

import sys
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import dct_compile
from dct_compile.bench.sockets import sent_bytes
from dct_compile.options import DENSE
from tests.processes import ROOT
from tests.rank_pool import Ranks

EXAMPLES = ROOT / "examples"
STEPS = 150
UNCOUNTED = 40_000
"""Bytes per step of what the report names and does not count: DTensor's gradients of norms, the tokens of experts."""
HEADERS = 144 * 1.2
"""Bytes around a message of gloo, and some for the ends of the training."""


class Trained(NamedTuple):
    """``measured``: bytes that the sockets have sent in all steps. ``dense``, ``wire``: bytes per step by the report."""

    loss: float
    measured: int
    dense: int
    wire: int
    messages: int
    copies: dict[str, torch.Tensor]
    report: str


def example(name: str) -> Any:
    """Returns an example as a module, with a model of one block: it compiles in half of the time.

    The examples import one another by their bare names.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    language: Any = import_module("language")
    language.BLOCKS = 1
    return import_module(name)


def trained(rank: int, world_size: int, name: str, options: dict[str, Any]) -> Trained:
    """Returns what came of the example. ``copies``: the parameters that are no shards, by name."""
    module = example(name)
    dist.barrier()
    start = sent_bytes()
    loss, model = module.train({"link": None, **options}, STEPS)
    dist.barrier()
    measured = sent_bytes() - start
    report = dct_compile.report()
    copies = {name: value.detach() for name, value in model.named_parameters() if not isinstance(value, DTensor)}
    return Trained(loss, measured, report.dense_bytes, report.wire_bytes, len(report.sites), copies, str(report))


def compare(ranks: Ranks, name: str, ratio: float, own: str | None = None) -> None:
    """Trains an example dense and compressed, and compares.

    Args:
        ranks: The ranks.
        name: The example.
        ratio: By how much fewer bytes a step sends at least, by the report.
        own: What is in the names of parameters that each rank has of its own.
    """
    dense, compressed = (ranks(trained, name, options) for options in (DENSE, {}))
    for plain, result in zip(dense, compressed, strict=True):
        assert result.dense / result.wire > ratio, result.report
        # Elements of a gradient wait for a hundred steps: so short a training is behind. Both begin at 2.77.
        assert result.loss < plain.loss + (0.6 if "density" in result.report else 0.05), result.report
        assert result.loss < 2.6
        assert plain.measured > 0.6 * min(ratio, 20) * result.measured
    check_bytes(compressed)
    check_copies(compressed, own)


def check_bytes(results: list[Trained]) -> None:
    """Compares the means over the ranks with the sockets."""
    measured, reported = (sum(values) / len(results) for values in zip(*((r.measured, r.wire * STEPS) for r in results), strict=True))
    overhead = STEPS * results[0].messages * 4 * HEADERS * (len(results) - 1)
    overhead += STEPS * sum(UNCOUNTED for note in ("not counted", "run time only") if note in results[0].report)
    parameters = sum(copy.numel() * copy.itemsize for copy in results[0].copies.values())  # made equal at the start
    assert 0.9 * reported <= measured <= 1.02 * reported + overhead + 3 * parameters, results[0].report


def check_copies(results: list[Trained], own: str | None) -> None:
    for name in {name for name in results[0].copies if own is None or own not in name}:
        assert all(torch.equal(result.copies[name], results[0].copies[name]) for result in results), name
