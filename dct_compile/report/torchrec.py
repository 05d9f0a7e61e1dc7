"""Finds the modules of torchrec whose embeddings are exchanged dense: no graph shows it."""

import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from dct_compile.reasons import Note, abbreviated

ENCODED_SUMS = "dct_encoded_sums"
"""The attribute of an output of a sharded module whose sums over ranks travel as codes: its sharding type."""
_SUMS = ("row_wise", "table_row_wise", "grid_shard")
"""The sharding types whose pooled embeddings are added up over ranks."""


def torchrec_notes() -> list[str]:
    """Returns notes about the sharded modules of torchrec in this process. Costs nothing where torchrec is not imported."""
    types = sys.modules.get("torchrec.distributed.types")
    if types is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return []
    # torchrec keeps no list of them, but every object refers to its class.
    modules = [item for item in gc.get_referrers(*_subclasses(types.ShardedModule)) if isinstance(item, types.ShardedModule)]
    dense = sorted({type(module).__name__ for module in modules if not _is_encoded(module) and _kinds(module)})
    summed = sorted({table for module in modules if _is_encoded(module) for table in _dense_sums(module)})
    return [
        *([Note.TORCHREC.format(modules=", ".join(dense))] if dense else []),
        *([Note.TORCHREC_SUMS.format(tables=abbreviated(summed))] if summed else []),
    ]


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


def _kinds(module: Any) -> dict[str, str]:
    """Returns the sharding type of each table that the module exchanges."""
    plan = getattr(module, "module_sharding_plan", None) or {}
    return {table: sharding.sharding_type for table, sharding in plan.items() if sharding.sharding_type != "data_parallel"}


def _dense_sums(module: Any) -> list[str]:
    """Returns the tables whose embeddings torchrec itself adds up over ranks."""
    if not hasattr(module, "embedding_bags"):
        return []
    encoded = {getattr(output, ENCODED_SUMS, None) for output in getattr(module, "_output_dists", ())}
    return [table for table, kind in _kinds(module).items() if kind in _SUMS and kind not in encoded]


def _is_encoded(module: Any) -> bool:
    codecs = (module.qcomm_codecs_registry or {}).values()
    return any(type(codec.forward).__module__.startswith("dct_compile.") for codec in codecs)
