"""What ``dct inspect`` looks at: a model of this project by its name, or what a function of the user's returns."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dct_compile.cli.asked import TargetError
from dct_compile.models.dlrm import DLRM
from dct_compile.models.gpt import GPT
from dct_compile.models.parallel import Mesh, Table, wrap_data_parallel
from dct_compile.models.resnet import ResNet


@dataclass(frozen=True)
class Target:
    """A model and what it is called with."""

    model: Callable[..., Any]
    inputs: tuple[Any, ...]
    named_inputs: Mapping[str, Any] = field(default_factory=dict)


MOVIELENS_TABLES = (
    Table("user", 943),
    Table("item", 1682),
    Table("age", 15),
    Table("gender", 2),
    Table("occupation", 21),
    Table("zip", 111),
    Table("year", 37),
    Table("genre", 20, width=6),
)
"""The demo's tables, so that it can be inspected without its data."""


def dlrm() -> Target:
    """Returns the demo's DLRM: two model-parallel ranks (one if the ranks are odd in number), all others data parallel, in DDP."""
    ranks = dist.get_world_size()
    mp = 2 - ranks % 2
    # Groups are made by hand: a device mesh would make the groups of all other ranks, too, which takes a while for a thousand of them.
    dp_group = dist.new_group(list(range(0, ranks, mp))) if ranks > mp else None
    mp_group = dist.new_group(list(range(mp))) if mp > 1 else None
    mesh = Mesh(ranks // mp, mp, dp_rank=0, mp_rank=0, dp_group=dp_group, mp_group=mp_group)
    model = DLRM(4, MOVIELENS_TABLES, mesh.mp_group)
    ids = torch.zeros(128, sum(table.width for table in MOVIELENS_TABLES), dtype=torch.int64)
    return Target(wrap_data_parallel(model, mesh), (torch.zeros(128, 4), ids))


def gpt() -> Target:
    """Returns a GPT of 2 blocks in DDP, called with a batch of 8 pieces of text."""
    text = torch.zeros(8, 64, dtype=torch.int64)
    return Target(DistributedDataParallel(GPT()), (text, text))


def resnet() -> Target:
    """Returns a ResNet of 8 layers in DDP, called with a batch of 64 images."""
    return Target(DistributedDataParallel(ResNet()), (torch.zeros(64, 1, 28, 28),))


MODELS: Mapping[str, Callable[[], Target]] = {"dlrm": dlrm, "gpt": gpt, "resnet": resnet}


def function_in(path: Path, name: str, needed: str) -> Callable[..., Any]:
    """Runs the file and returns its function. Raises :class:`TargetError`, which says that one ``needed`` so is missing."""
    function = getattr(_load(path), name, None)
    if not callable(function):
        raise TargetError(f"{path} has no function {name!r}; it needs one {needed}")
    return function  # type: ignore[no-any-return]


def made_by(path: Path, name: str) -> Target:
    """Returns what the function ``name`` of a file makes, under the process group that the model is for.

    Raises :class:`TargetError` for a broken file, a missing or failing function, and for results of another kind.
    """
    function = function_in(path, name, "without arguments that returns (model, inputs)")
    try:
        result = function()
    except (Exception, SystemExit) as error:
        raise TargetError(f"{name} in {path} raised {type(error).__name__}: {error}") from error
    return _as_target(result, f"{name} in {path}")


def _load(path: Path) -> ModuleType:
    """Runs the file as a module that is not ``__main__``; its folder can be imported from, as if it were run by ``python``.

    The module has a name that hides no other, whatever the file is called.
    """
    spec = importlib.util.spec_from_file_location(f"_inspected_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _as_target(result: Any, where: str) -> Target:
    if not isinstance(result, tuple) or len(result) != 2:
        what = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TargetError(f"{where} returned {what}; expected (model, inputs)")
    model, inputs = result
    if not isinstance(model, nn.Module):
        raise TargetError(f"{where} returned a {type(model).__name__} as the model; expected a torch.nn.Module")
    if isinstance(inputs, Tensor):
        return Target(model, (inputs,))
    if isinstance(inputs, tuple | list):
        return Target(model, tuple(inputs))
    if isinstance(inputs, dict):
        return Target(model, (), inputs)
    raise TargetError(f"{where} returned inputs of type {type(inputs).__name__}; expected a tensor, a tuple or a dict by argument name")
