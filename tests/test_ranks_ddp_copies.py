"""Copies of DDP modules that have trained compressed: deepcopy, torch.save and pickle, as under backend "inductor"."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import dct_compile
from dct_compile.backend import dct
from tests.rank_pool import Ranks
from tests.ranks import digest
from tests.ranks_audit import Auditor
from tests.ranks_ddp import Net, Options, ddp_of, train

pytestmark = pytest.mark.distributed

OPTIONS: Options = {"dp_density": 0.05, "dp_value_dtype": "float32"}


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "save": saved,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


class Outcome(NamedTuple):
    """``start``: whether the copy has its model's parameters. ``digests``: of the parameters at every step. ``state``: its names."""

    start: bool
    digests: list[str]
    state: list[str]


def copied(rank: int, world_size: int, inside: bool, whole: bool) -> dict[str, Outcome]:
    """Trains copies, and then the module itself, each with residuals that start at zero. ``whole``: copies what torch.compile returned."""
    module, compiled = ddp_of(Net(), OPTIONS, inside)
    train(module, compiled, rank, range(2))
    at_copying = digest(module.parameters())
    found = {}
    for name, make in COPIES.items():
        twin = make(compiled if whole else module)
        start = digest(twin.parameters()) == at_copying
        called = twin if inside or whole else torch.compile(twin, backend=dct, options=OPTIONS)
        found[name] = Outcome(start, *audited(twin, called, rank))
    dct_compile.load_state_dict(module, {})
    found["itself"] = Outcome(digest(module.parameters()) == at_copying, *audited(module, compiled, rank))
    return found


def audited(module: DistributedDataParallel, compiled: Any, rank: int) -> tuple[list[str], list[str]]:
    auditor = Auditor(module, 0.05, torch.float32)
    digests = train(module, compiled, rank, range(2, 5), auditor)
    auditor.finish()
    return digests, sorted(dct_compile.state_dict(module))


@pytest.mark.parametrize(("inside", "whole"), [(True, False), (False, False), (False, True)], ids=["inside", "around", "around, compiled"])
def test_a_copy_trains_as_its_model_does(ranks2: Ranks, inside: bool, whole: bool) -> None:
    first, second = ranks2(copied, inside, whole)
    assert first == second
    assert len(set(map(str, first.values()))) == 1
    assert first["itself"].start
    assert first["itself"].state == ["bottom.weight", "middle.weight", "side.weight", "top.weight"]
