"""The state of a bucket of parameters: residuals, thresholds, counters, and whatever else a scheme keeps from step to step.

The parameters of one bucket keep their state end to end in flat tensors, so that one kernel launch serves the whole bucket. The part of
each parameter is a view. A spec (``state_spec.py``) says which tensors there are and which part belongs to which parameter.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dct_compile.exchange import Segment
from dct_compile.state_spec import Part, StateSpec, StateTensor
from dct_compile.triton_kernels.layout import piece_share

Entry = dict[str, Any]
"""The state of one parameter: tensors by name; under "owner" those of the owner's stage, under "owner_share" which share it is."""


class BucketState:
    """The state of the parameters that are compressed together.

    ``tensors``: by input name, in the order of the spec. ``sole``: whether its parameters are in no other such bucket.
    """

    def __init__(self, parameters: Sequence[Tensor], spec: StateSpec, device: torch.device, sole: bool = False) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.spec, self.sole = spec, sole
        self.tensors = {item.input_name: torch.full(item.shape, item.fill or 0, dtype=item.dtype, device=device) for item in spec.tensors}
        for item in spec.tensors:
            for part in item.parts if item.fill is None else ():
                _reset(item, _view(self.tensors[item.input_name], part))

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Returns True if these are the parameters of the bucket, in this order."""
        return refer_to(self.parameters, parameters)

    def give_up(self, index: int) -> None:
        """Forgets the parameter at ``index``: another bucket has it now, and this one no longer :meth:`holds` its parameters."""
        self.parameters[index] = weakref.ref(torch.empty(0))  # dead at once

    def entry(self, index: int) -> Entry:
        """Returns the state of the parameter at ``index``, as views."""
        entry: Entry = {}
        for item in self.spec.tensors:
            stage = entry.setdefault(item.stage, {}) if item.stage else entry
            stage[item.name] = self._part(item, index)
        if self.spec.owner_share is not None:
            entry["owner_share"] = list(self.spec.owner_share)
        return entry

    def write(self, index: int, source: Entry | None) -> None:
        """Overwrites the state of one parameter with ``source`` (an :meth:`entry`), or with the initial state.

        What ``source`` does not have starts afresh, and the counters with it: a new threshold's schedule begins at step 0. A share that
        this rank owned under another geometry is added to its own residual: the sum over the ranks is unchanged, so nothing is lost.
        Raises ``ValueError`` for a residual of another shape.
        """
        residual = self.entry(index)["residual"]
        if source is not None and source["residual"].shape != residual.shape:
            raise ValueError(f"a residual of shape {tuple(source['residual'].shape)} was given, {tuple(residual.shape)} is needed")
        source = source or {}
        own_share = self.spec.owner_share is not None and source.get("owner_share") == list(self.spec.owner_share)
        for stage in dict.fromkeys(item.stage for item in self.spec.tensors):
            given = source if not stage else source.get(stage, {}) if own_share else {}
            self._write_stage([item for item in self.spec.tensors if item.stage == stage], index, given)
        if "owner" in source and not own_share:
            owned = source["owner"]["residual"].to(residual.device)
            block, chunks, chunk = source["owner_share"]
            start = chunk * piece_share(residual.numel(), block, chunks)
            residual[start : start + owned.numel()] += owned

    def _write_stage(self, items: Sequence[StateTensor], index: int, given: Entry) -> None:
        targets = {item: self._part(item, index) for item in items}
        fits = {item: item.name in given and given[item.name].shape == target.shape for item, target in targets.items()}
        for item, target in targets.items():
            if fits[item] and (item.name != "counters" or all(fits.values())):
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

    def _part(self, item: StateTensor, index: int) -> Tensor:
        return _view(self.tensors[item.input_name], item.parts[index])


def refer_to(refs: "Sequence[weakref.ref[Tensor]]", tensors: Sequence[Tensor]) -> bool:
    """Returns True if ``refs`` stand for exactly these tensors, in this order, and all of them live."""
    return len(refs) == len(tensors) and all(ref() is tensor for ref, tensor in zip(refs, tensors, strict=True))


def _view(tensor: Tensor, part: Part) -> Tensor:
    return tensor[part] if isinstance(part, int) else tensor[part[0] : part[1]]


def _reset(item: StateTensor, part: Tensor) -> None:
    """Sets the part of one parameter to its initial value, which is the same on all ranks."""
    if item.fill is None:
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel())))
    else:
        part.fill_(item.fill)
