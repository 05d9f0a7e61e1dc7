"""The state of a bucket of parameters: residuals, thresholds, counters, and whatever else a scheme keeps from step to step.

The parameters of one bucket keep their state end to end in flat tensors, so that one kernel launch serves the whole bucket. The part of
each parameter is a view. A spec (``spec.py``) says which tensors there are and which part belongs to which parameter.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dct_compile.element_order import ElementOrder
from dct_compile.exchange import Segment
from dct_compile.state.entry import Entry, copy_of, fold_late, fold_share, with_all_counters
from dct_compile.state.gradient_use import Use
from dct_compile.state.pending import Pending, view
from dct_compile.state.spec import LATE, LOCAL, StateSpec, StateTensor


class BucketState:
    """The state of the parameters that are compressed together.

    ``tensors``: by input name, in the order of the spec. ``family``: see :meth:`StateStore.bucket`. ``pending``: the exchanges that may
    still be taken back. Whoever takes one of these two waits for the exchange that is under way. ``under_way``: waits for it and raises its
    error; ``None`` without one. ``uses``: the fate of the gradient of each parameter; not needed for a state that is only looked at.
    """

    def __init__(
        self, parameters: Sequence[Tensor], spec: StateSpec, device: torch.device, uses: Sequence[Use] = (), *, family: str = ""
    ) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.spec, self.family = spec, family
        self.under_way: Callable[[], None] | None = None
        self._tensors = {item.input_name: torch.full(item.shape, item.fill or 0, dtype=item.dtype, device=device) for item in spec.tensors}
        for item in spec.tensors:
            for part in item.parts if item.fill is None else ():
                _reset(item, view(self.tensors[item.input_name], part))
        self._pending = Pending(self.tensors, spec, uses)
        self.densities: list[float | None] = [None] * len(spec.numels)
        """The density that each parameter was exchanged with last; ``None`` where that is not known."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        self._wait()
        return self._tensors

    @property
    def pending(self) -> Pending:
        self._wait()
        return self._pending

    @property
    def device(self) -> torch.device:
        """Where the tensors are. Waits for nothing."""
        return next(iter(self._tensors.values())).device

    def _wait(self) -> None:
        if self.under_way is not None:
            self.under_way()

    def finish(self) -> None:
        """Waits for the exchange that is under way. Its error is raised here for the last time: the training is told."""
        under_way, self.under_way = self.under_way, None
        if under_way is not None:
            under_way()

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Returns True if these are the parameters of the bucket, in this order."""
        return refer_to(self.parameters, parameters)

    @property
    def lives(self) -> bool:
        """Whether it holds the state of a parameter that lives."""
        return any(ref() is not None for ref in self.parameters)

    @property
    def is_given_up(self) -> bool:
        """Whether other buckets have all of its parameters now, or none of them lives."""
        return bool(self.parameters) and not self.lives

    def give_up(self, index: int) -> None:
        """Forgets the parameter at ``index``: another bucket has it now, and this one no longer :meth:`holds` its parameters."""
        self.parameters[index] = weakref.ref(torch.empty(0))  # dead at once

    def take_over(self, index: int, other: "BucketState", place: int) -> None:
        """Moves the state of a parameter here from ``place`` in ``other``, with that of before an exchange that may be taken back."""
        now, steps = other.saved(place), other.pending.take_back(place)
        other.give_up(place)
        if steps is not None:
            self.write(index, other.saved(place))
            self.pending.keep(index, steps)
        self.write(index, now)
        self.densities[index] = other.densities[place]

    def entry(self, index: int) -> Entry:
        """Returns the state of the parameter at ``index`` as views, with the residual in the order of the buffer."""
        entry: Entry = {}
        for item in self.spec.tensors:
            stage = entry.setdefault(item.stage, {}) if item.stage else entry
            stage[item.name] = self._part(item, index)
        if self.spec.owner_share is not None:
            entry["owner_share"] = list(self.spec.owner_share)
        return entry

    def follow(self, densities: Sequence[float]) -> None:
        """Lets thresholds that were chosen for another density be chosen anew, and the counters begin anew with them."""
        for index, (held, density) in enumerate(zip(self.densities, densities, strict=True)):
            if held not in (None, density):
                self.pending.restart(index)
            self.densities[index] = density

    def saved(self, index: int) -> Entry:
        """Returns a copy of the state of the parameter at ``index``, with the residual in row-major order."""
        entry, order = copy_of(self.entry(index)), self._order(index)
        if self.densities[index] is not None and "threshold" in entry:
            entry["density"] = self.densities[index]
        if order is not None:
            entry["residual"] = order.to_row_major(entry["residual"])
            if "owner" in entry:
                entry["owner_order"] = [list(order.shape), list(order.dims)]
        return entry

    def write(self, index: int, source: Entry | None) -> None:
        """Overwrites the state of one parameter with ``source`` (as :meth:`saved` returns it), or with the initial state.

        What ``source`` does not have starts afresh, and the counters with it: a new threshold's schedule begins at step 0. A share that
        this rank owned under another geometry is added to its own residual, and so is a late mean that nothing would hand out: the sum over
        the ranks is unchanged, so nothing is lost.
        Raises ``ValueError`` for a residual of another shape.
        """
        residual = self.entry(index)["residual"]
        if source is not None and source["residual"].shape != residual.shape:
            raise ValueError(f"a residual of shape {tuple(source['residual'].shape)} was given, {tuple(residual.shape)} is needed")
        source, order = source or {}, self._order(index)
        if all(item.name != LATE for item in self.spec.tensors):
            source = fold_late(source)
        self.densities[index] = source.get("density")
        own = [self.spec.owner_share and list(self.spec.owner_share), order and [list(order.shape), list(order.dims)]]
        if "owner" in source and own != [source["owner_share"], source.get("owner_order")]:
            source = fold_share(source)
        if source and order is not None:
            source = {**source, "residual": order.to_buffer(source["residual"])}
        for stage in dict.fromkeys(item.stage for item in self.spec.tensors):
            given = source.get(stage, {}) if stage else source
            self._write_stage([item for item in self.spec.tensors if item.stage == stage], index, given)

    def _write_stage(self, items: Sequence[StateTensor], index: int, given: Entry) -> None:
        given = with_all_counters(given)
        targets = {item: self._part(item, index) for item in items}
        fits = {item: item.name in given and given[item.name].shape == target.shape for item, target in targets.items()}
        whole = all(fit for item, fit in fits.items() if item.name not in (LOCAL, LATE))
        for item, target in targets.items():
            if fits[item] and (item.name != "counters" or whole):
                target.copy_(given[item.name])
            else:
                _reset(item, target)

    @contextmanager
    def skip_unused(self, gradient: Tensor, segments: Sequence[Segment]) -> Iterator[None]:
        """While it lasts, parameters whose segment of ``gradient`` is all zero send nothing; afterwards their state is as it was before.

        Decided on the device. For schemes without an owner's stage.
        """
        used = [gradient[segment.offset : segment.offset + segment.parameter.numel].any() for segment in segments]
        before = [{name: tensor.clone() for name, tensor in self.entry(index).items()} for index in range(len(used))]
        for index, flag in enumerate(used):
            self.entry(index)["residual"].mul_(flag)
        yield
        for index, flag in enumerate(used):
            for name, tensor in self.entry(index).items():
                tensor.copy_(torch.where(flag, tensor, before[index][name]))

    def _order(self, index: int) -> ElementOrder | None:
        return self.spec.orders[index] if self.spec.orders else None

    def _part(self, item: StateTensor, index: int) -> Tensor:
        return view(self.tensors[item.input_name], item.parts[index])


def refer_to(refs: "Sequence[weakref.ref[Tensor]]", tensors: Sequence[Tensor]) -> bool:
    """Returns True if ``refs`` stand for exactly these tensors, in this order, and all of them live."""
    return len(refs) == len(tensors) and all(ref() is tensor for ref, tensor in zip(refs, tensors, strict=True))


def _reset(item: StateTensor, part: Tensor) -> None:
    """Sets the part of one parameter to its initial value, which is the same on all ranks."""
    if item.fill is None:
        # On the CPU, whatever the default device is: there the numbers are the same for all ranks, and the generator is.
        part.copy_(torch.randn(part.shape, generator=torch.Generator("cpu").manual_seed(part.numel()), device="cpu"))
    else:
        part.fill_(item.fill)
