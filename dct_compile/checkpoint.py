"""Loads the states of another number of ranks with ``torch.distributed.checkpoint``."""

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from dct_compile.state.ranks import RankStates, sources


class LoadPlanner(DefaultLoadPlanner):
    """Lets ``torch.distributed.checkpoint.load`` read compressor states that another number of ranks has saved.

    Each rank asks for the states of all saved ranks that it takes over. All other values are loaded as by the default planner.

    Without it, a rank asks for the state of its own number.
    """

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Adds the requests to ``state_dict`` in place; called by ``torch.distributed.checkpoint.load``."""
        if metadata is not None:
            _request(state_dict, "", metadata.state_dict_metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)


def _request(values: Mapping[str, Any], prefix: str, stored: Collection[str]) -> None:
    if isinstance(values, RankStates):
        saved = next(rank for rank in count() if prefix + RankStates.key(rank) not in stored)
        if saved:
            rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            values.clear()
            values.update({RankStates.key(own): None for own in sources(rank, ranks, saved)})
        return
    for key, value in values.items():
        if isinstance(value, Mapping):
            _request(value, f"{prefix}{key}.", stored)
