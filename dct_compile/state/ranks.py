"""Saved states of several ranks: each rank has one of its own, and the mean of their residuals must survive another number of ranks.

What waits is owed to a mean over the ranks. Rank r of M takes over the saved ranks r, r + M, ... of N, or r % N where there is none. It
adds up their residuals, times M / N, divided by the number of ranks that take over the same ones::

    saved by 4 ranks, loaded by 2         saved by 2 ranks, loaded by 3
    rank 0  <-  (0 + 2) / 2               rank 0  <-  0 * 3/4
    rank 1  <-  (1 + 3) / 2               rank 1  <-  1 * 3/2
                                          rank 2  <-  0 * 3/4

A mean that arrives late is the same on all ranks, so each of them adds it to its residual before. All other tensors come from the first of
these ranks.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from dct_compile.state.checks import check_entry
from dct_compile.state.entry import NUMBER, Entry, copy_of, fold_late, fold_share


class StateDict(dict[str, Entry]):
    """The state of rank ``rank`` of ``ranks``: the state of each parameter, by its name.

    ``torch.save`` writes it as an ``OrderedDict`` with these two attributes, so ``torch.load(weights_only=True)`` reads it. For
    ``torch.distributed.checkpoint`` it is a ``Stateful``, with one value for each rank: values of equal keys are taken for replicas there.
    """

    def __init__(self, entries: Mapping[str, Entry], rank: int, ranks: int) -> None:
        super().__init__(entries)
        self.rank, self.ranks = rank, ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"rank": self.rank, "ranks": self.ranks}, None, iter(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateDict":
        return StateDict(deepcopy(dict(self), memo), self.rank, self.ranks)

    def state_dict(self) -> "RankStates":
        """Returns a copy on the CPU under a key of this process, for ``torch.distributed.checkpoint``."""
        entries = {name: copy_of(entry, torch.device("cpu")) for name, entry in self.items()}
        return RankStates({RankStates.key(dist.get_rank() if dist.is_initialized() else 0): (self.rank, self.ranks, entries)})

    def load_state_dict(self, state_dict: "Mapping[str, tuple[int, int, Mapping[str, Entry]]]") -> None:
        """Takes over the states of other ranks, as ``torch.distributed.checkpoint`` has loaded them.

        Args:
            state_dict: Results of :meth:`state_dict`, of all saved ranks that this rank takes over.

        Raises:
            ValueError: The state of a rank is missing or damaged.
        """
        given = [StateDict(entries, rank, ranks) for rank, ranks, entries in state_dict.values()]
        taken = take_over(given, self.rank, self.ranks)
        self.clear()
        self.update(taken)


class RankStates(dict[str, Any]):
    """States by rank of the process, as ``torch.distributed.checkpoint`` stores them. A value is no dict: it is stored as one."""

    @staticmethod
    def key(rank: int) -> str:
        return f"rank{rank}"


def rank_of(model: nn.Module, group: ProcessGroup | None) -> tuple[int, int]:
    """Returns this process's rank and the number of ranks in ``group``; by default in that of the model's DDP, else of all."""
    if group is None:
        group = next((module.process_group for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    if rank < 0:
        raise ValueError("this process is no rank of the group that was given; it must be one that averages the model's gradients")
    return rank, ranks


def sources(rank: int, ranks: int, saved: int) -> list[int]:
    """Returns the ranks of ``saved`` whose states ``rank`` of ``ranks`` takes over."""
    return list(range(rank, saved, ranks)) or [rank % saved]


def state_for(state: Mapping[str, Entry] | Sequence[Mapping[str, Entry]], rank: int, ranks: int) -> Mapping[str, Entry]:
    """Returns the state that ``rank`` of ``ranks`` loads, from one state or those of several ranks.

    Raises:
        ValueError: The state of a rank that it takes over is missing, given twice, or damaged.
    """
    if not isinstance(state, Mapping):
        return take_over(state, rank, ranks)
    # Made by hand, or by an older version: it does not say which rank it belongs to.
    return take_over([state], rank, ranks) if hasattr(state, "ranks") else state


def take_over(states: Sequence[Mapping[str, Entry]], rank: int, ranks: int) -> dict[str, Entry]:
    """Returns the state of ``rank`` of ``ranks`` from the saved states; one that does not name its rank has its position in the list.

    Raises:
        ValueError: The state of a rank that it takes over is missing, given twice, or damaged.
    """
    by_rank, total = _by_rank(states)
    wanted = sources(rank, ranks, total)
    missing = [own for own in wanted if own not in by_rank]
    if missing:
        raise ValueError(
            f"rank {rank} of {ranks} takes over the states of {_ranks(wanted)} of {total}; not given: {_ranks(missing)}. "
            "Give load_state_dict a list of all ranks' states, or torch.distributed.checkpoint.load planner=dct_compile.LoadPlanner()"
        )
    taken = [by_rank[own] for own in wanted]
    if ranks == total:
        return dict(taken[0])
    names = dict.fromkeys(name for state in taken for name in state)
    sharers = len(range(rank % total, ranks, total))
    factor = ranks / total / sharers
    return {name: _added(name, [state[name] for state in taken if name in state], factor) for name in names}


def _by_rank(states: Sequence[Mapping[str, Entry]]) -> tuple[dict[int, Mapping[str, Entry]], int]:
    """Returns the states by the rank that saved them, and how many ranks there were."""
    if not isinstance(states, list | tuple) or not states or not all(isinstance(state, Mapping) for state in states):
        raise ValueError(f"a state is a dict by parameter name, or a list of such dicts, not {states!r:.80}")
    totals = sorted({getattr(state, "ranks", len(states)) for state in states})
    if len(totals) > 1:
        raise ValueError(f"the states must be of one run, not of runs with {_listed(totals)} ranks")
    found: dict[int, Mapping[str, Entry]] = {}
    for position, state in enumerate(states):
        own = getattr(state, "rank", position)
        if own in found:
            raise ValueError(f"the state of rank {own} of {totals[0]} is given twice; each rank saves its own")
        found[own] = state
    return found, totals[0]


def _added(name: str, entries: Sequence[Entry], factor: float) -> Entry:
    """Returns the first of the states with ``factor`` times the residuals of all, and of the shares that they own, in its own."""
    for entry in entries:
        check_entry(name, entry, _numel(entries[0]))
    numbers = list(dict.fromkeys(entry.get(NUMBER) for entry in entries))
    if len(numbers) > 1:
        raise ValueError(
            f"the states of {name} were saved after {' and '.join(map(str, numbers))} exchanges; all ranks' must be of one step"
        )
    if "residual" not in entries[0]:
        return entries[0]
    first, *others = [fold_late(fold_share(entry)) for entry in entries]
    residual = first["residual"].clone()
    for other in others:
        residual += other["residual"].to(residual.device)
    return {**first, "residual": residual * factor}


def _numel(entry: Entry) -> int:
    residual = entry.get("residual") if isinstance(entry, dict) else None
    return residual.numel() if isinstance(residual, torch.Tensor) else 0


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {_listed(numbers)}"


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(", ".join(map(str, numbers)).rsplit(", ", 1))
