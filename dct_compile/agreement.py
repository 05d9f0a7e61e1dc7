"""All ranks of a group must compress alike, or their payloads would not fit together: compared once per group, before its first use."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from dct_compile.config import DCTConfig


@dataclass
class Agreement:
    """Remembers the groups whose ranks were found to agree."""

    agreed: set[str] = field(default_factory=set)

    def check(self, group: ProcessGroup, config: DCTConfig, signatures: Sequence[str]) -> None:
        """Compares the options and the decisions on the group's first sites with those of every other rank of ``group``.

        Goes through the store, not through a collective, so it cannot be mistaken for one of the model's. Waits for the other ranks as the
        first collective would. Raises ``RuntimeError`` on every rank, naming the first difference, when two ranks differ.
        """
        name = group.group_name
        if name in self.agreed or group.size() == 1 or dist.get_backend(group) == "fake":
            return
        store = PrefixStore(f"dct_compile/agreement/{name}", _get_default_store())
        mine = {"options": config.comparable(), "sites": list(signatures)}
        store.set(str(group.rank()), json.dumps(mine))
        for peer in range(group.size()):
            theirs = json.loads(store.get(str(peer)))
            difference = _difference(mine, theirs)
            if difference is not None:
                raise RuntimeError(
                    f"ranks {group.rank()} and {peer} of group {name!r} would compress differently: {difference}. "
                    "All ranks need the same options for backend 'dct' and the same model."
                )
        self.agreed.add(name)


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    for key, value in mine["options"].items():
        if theirs["options"].get(key) != value:
            return f"option {key!r} is {value!r} here and {theirs['options'].get(key)!r} there"
    for position in range(max(len(mine["sites"]), len(theirs["sites"]))):
        here, there = (side["sites"][position] if position < len(side["sites"]) else "no further site" for side in (mine, theirs))
        if here != there:
            return f"site {position} is {here!r} here and {there!r} there"
    return None
