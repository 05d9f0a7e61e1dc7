"""Finds, makes, moves, saves and restores the states of buckets.

The same parameters always find the same state again, whichever graph asks: a recompilation, an evaluation graph, a block that is compiled
once and reused for every layer.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dct_compile.state import BucketState, Entry
from dct_compile.state_spec import StateSpec

StateDict = dict[str, Entry]


class StateStore:
    """Finds, makes, moves, saves and restores the states of buckets."""

    def __init__(self) -> None:
        self._buckets: list[BucketState] = []
        self._pending: list[tuple[weakref.ref[Tensor], list[Entry]]] = []
        self._lock = threading.RLock()  # models may be trained in several threads

    def bucket(self, parameters: Sequence[Tensor], spec: StateSpec, *, sole: bool = False) -> BucketState:
        """Returns the state of exactly these parameters, made on first use.

        Args:
            parameters: The parameters of the bucket, in order, all on one device.
            spec: The tensors of the state. A state of another spec is another state.
            sole: True: the caller averages the gradient of a parameter in one bucket at a time, as DDP does. The state of a parameter moves
                along when it comes into another bucket, and the bucket of before gives it up. False: each bucket has a state of its own,
                because two graphs may average parts of a gradient.
        """
        with self._lock:
            for bucket in self._buckets:
                if bucket.holds(parameters) and bucket.spec == spec:
                    return bucket
            created = BucketState(parameters, spec, parameters[0].device, sole)
            for index, parameter in enumerate(parameters):
                found = self._take_held(parameter, sole) or self._take_pending(parameter)
                if found is not None:
                    created.write(index, found)
            self._buckets = [bucket for bucket in self._buckets if any(ref() is not None for ref in bucket.parameters)]
            self._pending = [(ref, waiting) for ref, waiting in self._pending if ref() is not None]
            self._buckets.append(created)
            return created

    def _take_held(self, parameter: Tensor, sole: bool) -> Entry | None:
        """Takes the state of ``parameter`` out of a bucket of before, if it may move: see :meth:`bucket`.

        It moves as well where a parameter beside it is gone. Nobody asks for such a bucket again.
        """
        for bucket, index in self.entries(parameter):
            if bucket.sole == sole and (sole or any(ref() is None for ref in bucket.parameters)):
                bucket.give_up(index)
                return bucket.entry(index)
        return None

    def entries(self, parameter: Tensor) -> Iterator[tuple[BucketState, int]]:
        """Yields every (bucket, index) that holds state of ``parameter``; more than one when two graphs compress it separately."""
        for bucket in list(self._buckets):
            for index, ref in enumerate(bucket.parameters):
                if ref() is parameter:
                    yield bucket, index

    def state_dict(self, model: nn.Module) -> StateDict:
        """Returns a copy of the state of ``model``'s parameters on this rank.

        Args:
            model: The model, with or without the wrappers of DDP and torch.compile.

        Returns:
            The state of each parameter, keyed by parameter name without wrapper prefixes. A second state of one parameter has the key
            ``name@1``.
        """
        saved: StateDict = {}
        with self._lock:
            for name, parameter in named_parameters(model):
                found = [bucket.entry(index) for bucket, index in self.entries(parameter)]
                found += [entry for ref, waiting in self._pending if ref() is parameter for entry in waiting]
                saved.update({_key(name, ordinal): _clone(entry) for ordinal, entry in enumerate(found)})
        return saved

    def load_state_dict(self, model: nn.Module, saved: StateDict) -> None:
        """Restores the result of :meth:`state_dict`. Works before the first compilation too.

        Args:
            model: The model, with or without the wrappers of DDP and torch.compile.
            saved: The state by parameter name. A parameter that it lacks starts afresh, so an empty dict resets the model's state.

        Raises:
            ValueError: The model has no parameter of a name, or a residual has another number of elements.
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
        with self._lock:
            for name, parameter in names.items():
                self._load(parameter, [saved[key] for key in _numbered_keys(name, saved)])

    def _load(self, parameter: Tensor, given: Sequence[Entry]) -> None:
        """Overwrites the states of ``parameter``, and keeps those that no bucket holds yet."""
        self._take_pending(parameter, everything=True)
        held = list(self.entries(parameter))
        for ordinal, (bucket, index) in enumerate(held):
            bucket.write(index, given[ordinal] if ordinal < len(given) else None)
        if len(given) > len(held):
            self._pending.append((weakref.ref(parameter), [_clone(entry) for entry in given[len(held) :]]))

    def _take_pending(self, parameter: Tensor, everything: bool = False) -> Entry | None:
        for position, (ref, waiting) in enumerate(self._pending):
            if ref() is parameter:
                first = waiting.pop(0)
                if everything or not waiting:
                    del self._pending[position]
                return first
        return None


def local_tensor(parameter: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, and any other tensor itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields ``model.named_parameters()`` without the parts of the names that DDP and torch.compile add."""
    for name, parameter in model.named_parameters():
        *path, last = name.split(".")
        module, kept = model, []
        for part in path:
            if not isinstance(module, DistributedDataParallel | OptimizedModule):
                kept.append(part)
            module = module.get_submodule(part)
        yield ".".join([*kept, last]), parameter


def _key(name: str, ordinal: int) -> str:
    return name + (f"@{ordinal}" if ordinal else "")


def _numbered_keys(name: str, saved: StateDict) -> Iterator[str]:
    ordinal = 0
    while (key := _key(name, ordinal)) in saved:
        yield key
        ordinal += 1


def _clone(entry: Entry) -> Entry:
    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return {key: copy(item) for key, item in value.items()} if isinstance(value, dict) else value

    return {key: copy(value) for key, value in entry.items()}
