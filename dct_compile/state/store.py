"""Finds, makes, moves, saves and restores the states of buckets.

The same parameters always find the same state again, whichever graph asks: a recompilation, an evaluation graph, a block that is compiled
once and reused for every layer.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from dct_compile.element_order import local_tensor
from dct_compile.state.bucket import BucketState
from dct_compile.state.checks import check_entry
from dct_compile.state.entry import Entry, copy_of, fold_late
from dct_compile.state.exchanges import default_number, restore_number, with_number
from dct_compile.state.gradient_use import GradientUse
from dct_compile.state.keys import by_parameter, key_of
from dct_compile.state.spec import StateSpec


class StateStore:
    """Finds, makes, moves, saves and restores the states of buckets."""

    def __init__(self) -> None:
        self.use = GradientUse()
        self._buckets: list[BucketState] = []
        self._pending: list[tuple[weakref.ref[Tensor], list[Entry]]] = []
        self._lock = threading.RLock()  # models may be trained in several threads

    def bucket(self, parameters: Sequence[Tensor], spec: StateSpec, family: str = "", device: torch.device | None = None) -> BucketState:
        """Returns the state of exactly these parameters, made on first use. A state on another device moves.

        Args:
            parameters: The parameters of the bucket, in order, all on one device.
            spec: The tensors of the state. A state of another spec is another state.
            family: The name of those buckets that share a parameter's gradient out among them: a parameter is in one of them at a time, as
                under DDP. Its state moves along when it comes into another one, and the bucket of before gives it up. Without a family
                each bucket has a state of its own, because two graphs may average parts of a gradient.
            device: Where the gradients are exchanged. By default that is where the parameters are; FSDP may have offloaded those.
        """
        device = device or parameters[0].device
        with self._lock:
            found = next((bucket for bucket in self._buckets if bucket.holds(parameters) and bucket.spec == spec), None)
            if found is not None and found.device == device:
                found.spec = spec  # with the densities of today
                return found
            created = BucketState(parameters, spec, device, self.use.of(parameters), family=family)
            if found is not None:
                self._settle_now([found])
            for index, parameter in enumerate(parameters):
                held = (found, index) if found is not None else self._find_held(parameter, family)
                if held is not None:
                    created.take_over(index, *held)
                elif (loaded := self._take_pending(parameter)) is not None:
                    created.write(index, loaded)
            self._buckets = [bucket for bucket in self._buckets if bucket.lives]
            self._pending = [(ref, waiting) for ref, waiting in self._pending if ref() is not None]
            self._buckets.append(created)
            return created

    def _find_held(self, parameter: Tensor, family: str) -> tuple[BucketState, int] | None:
        """Returns the bucket of before that holds the state of ``parameter``, and its place there, if it may move: see :meth:`bucket`.

        It moves as well where a parameter beside it is gone. Nobody asks for such a bucket again.
        """
        for bucket, index in self.entries(parameter):
            if bucket.family == family and (family or any(ref() is None for ref in bucket.parameters)):
                self._settle_now([bucket])
                return bucket, index
        return None

    def entries(self, parameter: Tensor) -> Iterator[tuple[BucketState, int]]:
        """Yields every (bucket, index) that holds state of ``parameter``; more than one when two graphs compress it separately."""
        for bucket in list(self._buckets):
            for index, ref in enumerate(bucket.parameters):
                if ref() is parameter:
                    yield bucket, index

    def state_dict(self, model: nn.Module) -> dict[str, Entry]:
        """Returns a copy of the state of ``model``'s parameters on this rank.

        Args:
            model: The model, with or without the wrappers of DDP and torch.compile.

        Returns:
            The state of each parameter, keyed by parameter name without wrapper prefixes. A second state of one parameter has the key
            ``name@1``.
        """
        saved: dict[str, Entry] = {}
        with self._lock:
            self._settle_now(list(self._held(model)))
            for name, parameter in named_parameters(model):
                found = [bucket.saved(index) for bucket, index in self.entries(parameter)]
                found += [copy_of(entry) for ref, waiting in self._pending if ref() is parameter for entry in waiting]
                found = with_number(found, self.use.find(parameter))
                saved.update({key_of(name, ordinal): entry for ordinal, entry in enumerate(found)})
        return saved

    def load_state_dict(self, model: nn.Module, saved: Mapping[str, Entry]) -> None:
        """Restores the result of :meth:`state_dict`. Works before the first compilation too.

        Args:
            model: The model, with or without the wrappers of DDP and torch.compile.
            saved: The state by parameter name. A parameter that it lacks starts afresh, so an empty dict resets the model's state.

        Raises:
            ValueError: The model has no parameter of a name, or a state is damaged. Nothing has been loaded then.
        """
        names = dict(named_parameters(model))
        states = by_parameter(saved, names)
        for name, entries in states.items():
            for entry in entries:
                check_entry(name, entry, local_tensor(names[name]).numel())
        default = default_number(states.values())
        for name, parameter in names.items():
            with self._lock:
                (use,) = self.use.of([parameter])
                self._load(parameter, restore_number(use, states[name], default))

    def _load(self, parameter: Tensor, given: Sequence[Entry]) -> None:
        """Overwrites the states of ``parameter``, and keeps those that no bucket holds yet."""
        self._take_pending(parameter, everything=True)
        held = list(self.entries(parameter))
        for ordinal, (bucket, index) in enumerate(held):
            self._settle(bucket)
            bucket.pending.forget([index])
            bucket.write(index, given[ordinal] if ordinal < len(given) else None)
        if len(given) > len(held):
            self._pending.append((weakref.ref(parameter), [copy_of(entry) for entry in given[len(held) :]]))

    def discard(self, model: nn.Module) -> None:
        """Takes back what the gradients since the last step of the optimizer have left in the state of ``model``'s parameters."""
        for bucket, indices in self._held(model).items():
            bucket.pending.discard(indices)

    def drain(self, model: nn.Module) -> None:
        """Adds the means that no gradient of ``model``'s parameters has joined yet to the residuals."""
        with self._lock:
            held = self._held(model)
            self._settle_now(list(held))
            for bucket, indices in held.items():
                for index in indices:
                    bucket.pending.drain(index)
            own = {id(parameter) for parameter in model.parameters()}
            for ref, waiting in self._pending:
                if id(ref()) in own:
                    waiting[:] = map(fold_late, waiting)

    def multiply(self, model: nn.Module, factor: float) -> None:
        """Multiplies what waits to be sent for ``model``'s parameters."""
        for bucket in self._held(model):
            bucket.pending.multiply(factor)

    def _held(self, model: nn.Module) -> dict[BucketState, list[int]]:
        """Returns the buckets that hold parameters of ``model``, each with their places in it."""
        found: dict[BucketState, list[int]] = {}
        for parameter in model.parameters():
            for bucket, index in self.entries(parameter):
                found.setdefault(bucket, []).append(index)
        return found

    def _settle_now(self, buckets: Sequence[BucketState]) -> None:
        """Settles ``buckets`` by the gradients that there are now, between two backwards."""
        self.use.look([parameter for bucket in buckets for ref in bucket.parameters if (parameter := ref()) is not None])
        for bucket in buckets:
            self._settle(bucket)

    @staticmethod
    def _settle(bucket: BucketState) -> None:
        """Leaves in the state what the optimizer has applied, in units of an unscaled loss."""
        bucket.pending.settle()
        bucket.pending.rescale_to(1.0)

    def _take_pending(self, parameter: Tensor, everything: bool = False) -> Entry | None:
        for position, (ref, waiting) in enumerate(self._pending):
            if ref() is parameter:
                first = waiting.pop(0)
                if everything or not waiting:
                    del self._pending[position]
                return first
        return None


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
