"""Compressor state: residuals, thresholds and counters, which belong to parameters and enter every graph as explicit inputs.

The parameters of one bucket keep their state end to end in flat tensors, so that one kernel launch serves the whole bucket; each
parameter's part is a view. The same parameters always find the same state again, whichever graph asks (a recompilation, an evaluation
graph, a block that is compiled once and reused for every layer).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dct_compile.triton_kernels.layout import COUNTERS, GradientLayout, piece_share

StateDict = dict[str, dict[str, Any]]
STATE_INPUTS = ("residual", "threshold", "counters", "owner_residual", "owner_threshold", "owner_counters")
"""The graph inputs of one bucket, in order; the last three under "owner" only."""


@dataclass
class StageState:
    """State of one compression stage over one buffer: residual float32 [state_numel], threshold float32 [S], counters int64 [S, 4]."""

    residual: Tensor
    threshold: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, layout: GradientLayout, device: torch.device) -> "StageState":
        segments = len(layout.segments)
        return cls(
            torch.zeros(layout.state_numel, device=device),
            torch.full((segments,), float("inf"), device=device),
            torch.zeros(segments, COUNTERS, dtype=torch.int64, device=device),
        )

    def tensors(self) -> list[Tensor]:
        return [self.residual, self.threshold, self.counters]

    def part(self, segment: int, start: int, numel: int) -> dict[str, Tensor]:
        """Views of one parameter's share."""
        return {
            "residual": self.residual[start : start + numel],
            "threshold": self.threshold[segment],
            "counters": self.counters[segment],
        }


class BucketState:
    """The state of the parameters that are compressed together: a local stage and, for the "owner" scheme, the owner's stage.

    ``layout`` is that of the whole bucket, ``owner_layout`` that of this rank's chunk (``None`` for "gather").
    """

    def __init__(
        self, parameters: Sequence[Tensor], layout: GradientLayout, owner_layout: GradientLayout | None, device: torch.device
    ) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.layout, self.owner_layout = layout, owner_layout
        self.local = StageState.empty(layout, device)
        self.owner = StageState.empty(owner_layout, device) if owner_layout is not None else None

    def tensors(self) -> list[Tensor]:
        """The graph inputs, in the order of :data:`STATE_INPUTS`."""
        return self.local.tensors() + (self.owner.tensors() if self.owner is not None else [])

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        return len(parameters) == len(self.parameters) and all(
            ref() is parameter for ref, parameter in zip(self.parameters, parameters, strict=True)
        )

    def entry(self, segment: int) -> dict[str, Any]:
        """The state of one parameter: views, plus which share of it this rank owns."""
        start = sum(numel for _, numel in self.layout.segments[:segment])
        numel = self.layout.segments[segment][1]
        entry: dict[str, Any] = dict(self.local.part(segment, start, numel))
        if self.owner is not None and self.owner_layout is not None:
            piece = self.owner_layout.pieces[segment]
            entry["owner"] = self.owner.part(segment, piece.state_offset, piece.numel)
            entry["owner_share"] = [self.owner_layout.block, self.owner_layout.chunks, self.owner_layout.chunk]
        return entry

    @contextmanager
    def holding_unused(self, gradient: Tensor) -> Iterator[None]:
        """While it lasts, parameters whose part of ``gradient`` is all zero send nothing; afterwards their state is as it was before.

        Decided on the device. For the "gather" scheme only: an owner cannot know.
        """
        used = [gradient[offset : offset + numel].any() for offset, numel in self.layout.segments]
        before = [_clone(self.entry(segment)) for segment in range(len(used))]
        for segment, flag in enumerate(used):
            self.entry(segment)["residual"].mul_(flag)
        yield
        for segment, flag in enumerate(used):
            for key, tensor in self.entry(segment).items():
                tensor.copy_(torch.where(flag, tensor, before[segment][key]))

    def write(self, segment: int, source: dict[str, Any] | None) -> None:
        """Overwrites one parameter's state with ``source`` (an :meth:`entry`), or with the initial state."""
        target = self.entry(segment)
        if source is None:
            _reset(target)
            if "owner" in target:
                _reset(target["owner"])
            return
        if source["residual"].shape != target["residual"].shape:
            raise ValueError(
                f"a residual of shape {tuple(source['residual'].shape)} was given, {tuple(target['residual'].shape)} is needed"
            )
        _copy(target, source)
        if "owner" in target and source.get("owner_share") == target["owner_share"]:
            _copy(target["owner"], source["owner"])
            return
        if "owner" in target:
            _reset(target["owner"])
        if "owner" in source:
            # The share that this rank owned goes to its own residual: the sum over ranks is unchanged, so nothing is lost.
            owned = source["owner"]["residual"].to(target["residual"].device)
            block, chunks, chunk = source["owner_share"]
            start = chunk * piece_share(target["residual"].numel(), block, chunks)
            target["residual"][start : start + owned.numel()] += owned


def _reset(entry: dict[str, Any]) -> None:
    entry["residual"].zero_()
    entry["threshold"].fill_(float("inf"))
    entry["counters"].zero_()


def _copy(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key in ("residual", "threshold", "counters"):
        target[key].copy_(source[key])


class StateStore:
    """Finds, creates, moves, saves and restores bucket states."""

    def __init__(self) -> None:
        self._buckets: list[BucketState] = []
        self._pending: list[tuple[weakref.ref[Tensor], list[dict[str, Any]]]] = []

    def bucket(self, parameters: Sequence[Tensor], layout: GradientLayout, owner_layout: GradientLayout | None) -> BucketState:
        """The state of exactly these parameters with this geometry, made on first use."""
        for bucket in self._buckets:
            if bucket.holds(parameters) and _geometry(bucket.layout, bucket.owner_layout) == _geometry(layout, owner_layout):
                return bucket
        self._buckets = [bucket for bucket in self._buckets if all(ref() is not None for ref in bucket.parameters)]
        self._pending = [(ref, waiting) for ref, waiting in self._pending if ref() is not None]
        created = BucketState(parameters, layout, owner_layout, parameters[0].device)
        for segment, parameter in enumerate(parameters):
            loaded = self._take_pending(parameter)
            if loaded is not None:
                created.write(segment, loaded)
        self._buckets.append(created)
        return created

    def move(self, retired: Sequence[BucketState], created: BucketState) -> None:
        """Hands the state of ``created``'s parameters over from the buckets that they were in before (DDP rebuilds its buckets once)."""
        for bucket in retired:
            for segment, ref in enumerate(bucket.parameters):
                for target, other in enumerate(created.parameters):
                    if other() is ref():
                        created.write(target, bucket.entry(segment))

    def retire(self, buckets: Sequence[BucketState]) -> None:
        """Forgets buckets whose state has been moved."""
        self._buckets = [bucket for bucket in self._buckets if bucket not in buckets]

    def entries(self, parameter: Tensor) -> Iterator[tuple[BucketState, int]]:
        """Every (bucket, segment) that holds state of ``parameter``; more than one when two graphs compress it separately."""
        for bucket in self._buckets:
            for segment, ref in enumerate(bucket.parameters):
                if ref() is parameter:
                    yield bucket, segment

    def state_dict(self, model: nn.Module) -> StateDict:
        """A copy of the state of ``model``'s parameters on this rank, keyed by parameter name without wrapper prefixes."""
        saved: StateDict = {}
        for name, parameter in named_parameters(model):
            found = [bucket.entry(segment) for bucket, segment in self.entries(parameter)]
            found += [entry for ref, waiting in self._pending if ref() is parameter for entry in waiting]
            saved.update({_key(name, ordinal): _clone(entry) for ordinal, entry in enumerate(found)})
        return saved

    def load_state_dict(self, model: nn.Module, saved: StateDict) -> None:
        """Restores :meth:`state_dict`'s result; parameters that it lacks start afresh, so an empty dict resets the model's state.

        Works before the first compilation too. Raises ``ValueError`` for a name that the model does not have and for a wrong shape.
        """
        names = dict(named_parameters(model))
        unknown = [key for key in saved if key.split("@")[0] not in names]
        if unknown:
            raise ValueError(f"the state names parameters that the model does not have: {', '.join(unknown)}; it has {', '.join(names)}")
        for name, parameter in names.items():
            for entry in [saved[key] for key in _numbered_keys(name, saved)]:
                if entry["residual"].numel() != local_tensor(parameter).numel():
                    raise ValueError(
                        f"{name} has {local_tensor(parameter).numel()} elements, its residual in the state has {entry['residual'].numel()}"
                    )
        for name, parameter in names.items():
            given = [saved[key] for key in _numbered_keys(name, saved)]
            self._take_pending(parameter, everything=True)
            held = list(self.entries(parameter))
            for ordinal, (bucket, segment) in enumerate(held):
                bucket.write(segment, given[ordinal] if ordinal < len(given) else None)
            if len(given) > len(held):
                self._pending.append((weakref.ref(parameter), [_clone(entry) for entry in given[len(held) :]]))

    def _take_pending(self, parameter: Tensor, everything: bool = False) -> dict[str, Any] | None:
        for position, (ref, waiting) in enumerate(self._pending):
            if ref() is parameter:
                first = waiting.pop(0)
                if everything or not waiting:
                    del self._pending[position]
                return first
        return None


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` without the parts of the names that DDP and torch.compile add."""
    for name, parameter in model.named_parameters():
        *path, last = name.split(".")
        module, kept = model, []
        for part in path:
            if not isinstance(module, DistributedDataParallel | OptimizedModule):
                kept.append(part)
            module = module.get_submodule(part)
        yield ".".join([*kept, last]), parameter


def _geometry(layout: GradientLayout, owner_layout: GradientLayout | None) -> tuple[Any, ...]:
    numels = tuple(numel for _, numel in layout.segments)
    owner = (owner_layout.block, owner_layout.chunks, owner_layout.chunk) if owner_layout is not None else None
    return numels, owner


def _key(name: str, ordinal: int) -> str:
    return name + (f"@{ordinal}" if ordinal else "")


def _numbered_keys(name: str, saved: StateDict) -> Iterator[str]:
    ordinal = 0
    while (key := _key(name, ordinal)) in saved:
        yield key
        ordinal += 1


def _clone(entry: dict[str, Any]) -> dict[str, Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return {key: copy(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {key: copy(value) for key, value in entry.items()}
