"""Finds the modules of torchrec whose embeddings are exchanged dense: no graph shows it."""

import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from dct_compile.reasons import Note, abbreviated

_SUMS = ("row_wise", "table_row_wise", "grid_shard")
"""The sharding types whose pooled embeddings are added up over ranks."""


def torchrec_notes() -> list[str]:
    """Returns notes about the sharded modules of torchrec in this process. Costs nothing where torchrec is not imported."""
    types = sys.modules.get("torchrec.distributed.types")
    if types is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    # torchrec keeps no list of them, but every object refers to its class.
    found = [item for item in gc.get_referrers(*_subclasses(types.ShardedModule)) if isinstance(item, types.ShardedModule)]
    modules = {module: _exchanged(module) for module in found if _exchanged(module)}
    dense = sorted({type(module).__name__ for module in modules if not _is_encoded(module)})
    summed = sorted({table for module, tables in modules.items() for table, kind in tables.items() if _adds_up(module, kind)})
    return [
        *([Note.TORCHREC.format(modules=", ".join(dense))] if dense else []),
        *([Note.TORCHREC_SUMS.format(tables=abbreviated(summed))] if summed else []),
    ]


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def _exchanged(module: Any) -> dict[str, str]:
    """Returns the sharding types of the tables whose embeddings the module exchanges, by name."""
    plan = getattr(module, "module_sharding_plan", None) or {}
    return {table: sharding.sharding_type for table, sharding in plan.items() if sharding.sharding_type != "data_parallel"}


def _adds_up(module: Any, sharding_type: str) -> bool:
    return sharding_type in _SUMS and hasattr(module, "embedding_bags")


def _is_encoded(module: Any) -> bool:
    codecs = (module.qcomm_codecs_registry or {}).values()
    return any(type(codec.forward).__module__.startswith("dct_compile.") for codec in codecs)
