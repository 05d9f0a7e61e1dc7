"""Knows the factor of the loss whose backward runs: that of the gradient scaler that has scaled it.

torch has no hook for this, so :meth:`torch.amp.GradScaler.scale` is wrapped: the backward of what it returns begins with a note of the
factor. The scaler that makes the step is known too late: gradient and residual are added before.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.autograd import Variable

NO_BACKWARD = -1
"""The number of the present backward pass outside of any."""


@dataclass(frozen=True, eq=False)
class _Note:
    task: int
    scale: "float | Tensor"


class LossScales:
    """The factors of all losses whose backward runs, by the number of the backward."""

    def __init__(self) -> None:
        # Autograd holds a note until its backward has ended, with or without an error.
        self._notes: weakref.WeakValueDictionary[int, _Note] = weakref.WeakValueDictionary()

    def present(self) -> "float | Tensor | None":
        """Returns the factor of the loss whose backward runs: 1 if no scaler has scaled it, ``None`` outside of a backward.

        A tensor on a GPU.
        """
        task = torch._C._current_graph_task_id()
        if task == NO_BACKWARD:
            return None
        # A checkpoint with ``use_reentrant=True`` runs a backward within that of the loss. It has a greater number, and no note.
        notes = [note for ref in self._notes.valuerefs() if (note := ref()) is not None and note.task <= task]
        return max(notes, key=lambda note: note.task).scale if notes else 1.0

    def noting(self, scale: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``scale``, a method of a gradient scaler, which notes its factor when the backward of its result runs."""

        @functools.wraps(scale)
        @_disable_dynamo
        def noted(scaler: GradScaler, outputs: "Tensor | Iterable[Tensor]") -> Any:
            scaled = scale(scaler, outputs)
            return self._follow(scaler, scaled) if scaler.is_enabled() else scaled

        return noted

    def _follow(self, scaler: GradScaler, scaled: Any) -> Any:
        """Lets the backward of each tensor in ``scaled`` note the present factor of ``scaler``. Returns ``scaled``."""
        if isinstance(scaled, Tensor):
            if scaled.grad_fn is not None and scaler._scale is not None:
                scale = scaler._scale.detach()
                scaled.grad_fn.register_prehook(functools.partial(self._note, scale.clone() if scale.is_cuda else scale.item()))
        elif isinstance(scaled, list | tuple):
            for item in scaled:
                self._follow(scaler, item)
        else:  # an iterator, which scales one by one
            return map(functools.partial(self._follow, scaler), scaled)
        return scaled

    def _note(self, scale: "float | Tensor", _: object) -> None:
        note = _Note(torch._C._current_graph_task_id(), scale)
        self._notes[note.task] = note
        Variable._execution_engine.queue_callback(functools.partial(_keep, note))  # the backward holds the note with its callback


def _keep(_: _Note) -> None:
    """Does nothing."""


@functools.cache
def loss_scales() -> LossScales:
    """Returns the factors of losses, which gradient scalers note from the first call on, in the whole process."""
    scales = LossScales()
    for kind in (GradScaler, *_subclasses(GradScaler)):
        if "scale" in vars(kind):
            setattr(kind, "scale", scales.noting(vars(kind)["scale"]))  # noqa: B010
    return scales


def _subclasses(kind: type[GradScaler]) -> Iterator[type[GradScaler]]:
    for found in kind.__subclasses__():
        yield found
        yield from _subclasses(found)
