"""Keeps the state of before an exchange until an optimizer has applied the gradient, and restores it where the gradient is discarded.

Of a gradient that is thrown away (``zero_grad`` without a step) most waits in the residual. Unless it is taken out, it comes back later.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dct_compile.state.gradient_use import Use
from dct_compile.state.spec import LATE, Part, StateSpec

_IN_UNITS_OF_THE_GRADIENT = ("residual", "threshold", LATE)


class Pending:
    """The exchanges of one bucket whose gradients no optimizer has applied yet.

    ``tensors``: the state of the bucket, by input name. They are changed in place, past autograd, which holds them for a backward.
    ``uses``: the fate of the gradient of each parameter. ``scale``: the factor of the loss that the residual contains, see
    :class:`torch.amp.GradScaler`. ``restarts``: how often counters were reset.
    """

    def __init__(self, tensors: Mapping[str, Tensor], spec: StateSpec, uses: Sequence[Use]) -> None:
        self.tensors, self.spec, self.uses = tensors, spec, uses
        self.scale: float | Tensor = 1.0
        self.restarts = 0
        self._before: dict[str, Tensor] = {}
        # The number of steps of each parameter's optimizer at its last exchange; None where nothing is pending.
        self._steps: list[int | None] = [None] * len(uses)

    def begin(self, keep: bool, final: bool = False) -> bool:
        """Prepares the state for an exchange: settles the last one, and follows the scale of the loss.

        Args:
            keep: Whether the present state is kept, so that it can be restored. It takes a copy.
            final: Whether the exchange counts as applied, as on a rank without inputs: the others apply the gradient.

        Returns:
            False if a gradient may have been discarded, and no optimizer is known that would have applied it. It counts as applied.
        """
        if final:
            self.forget()
        certain = self.settle()
        self.rescale_to(self.uses[0].scale)  # one backward makes the gradients of a bucket
        if keep:
            settled = [index for index, steps in enumerate(self._steps) if steps is None]
            self._before = self._before or {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}
            self._copy(self.tensors, self._before, settled)
            if LATE in self._before:  # what is not finite is handed out now, once: it would cause every later step to be skipped
                self._before[LATE].nan_to_num_(0.0, 0.0, 0.0)
        for index, use in enumerate(self.uses):
            self._steps[index] = None if final else use.steps
            use.note_exchange()
        return certain

    def settle(self) -> bool:
        """Takes back what discarded gradients have left in the state.

        Returns:
            False where that is not certain, see :meth:`begin`.
        """
        certain, restored = True, []
        for index, (use, steps) in enumerate(zip(self.uses, self._steps, strict=True)):
            if steps is None:
                continue
            if use.steps != steps:
                self._steps[index] = None
                if use.skipped is not None:
                    self._restore(index, use.skipped != 0)
            elif use.absent is not False and not use.has_optimizer:
                self._steps[index] = None
                certain = certain and use.changed
            elif use.absent is True:
                restored.append(index)
            elif use.absent is not False:
                self._restore(index, use.absent)
        self._copy(self._before, self.tensors, restored)
        return certain

    def discard(self, indices: Sequence[int]) -> None:
        """Takes back the exchanges of the parameters at ``indices`` since their optimizer's last step, or all if none is known."""
        waiting = [index for index in indices if self._steps[index] == self.uses[index].steps]
        if waiting and not self._before:
            raise RuntimeError("option 'undo_discarded' is False: no state of before the backward is kept; allowed is True")
        self._copy(self._before, self.tensors, waiting)
        self.forget(waiting)

    def forget(self, indices: "Iterable[int] | None" = None) -> None:
        """Regards the exchanges of the parameters at ``indices``, or of all, as settled."""
        for index in range(len(self._steps)) if indices is None else indices:
            self._steps[index] = None

    def take_back(self, index: int) -> int | None:
        """Takes back a pending exchange of one parameter. Returns the steps of its optimizer at that exchange; ``None`` without one."""
        steps, self._steps[index] = self._steps[index], None
        if steps is None or not self._before:
            return None
        self._copy(self._before, self.tensors, [index])
        return steps

    def keep(self, index: int, steps: int) -> None:
        """Keeps the state of one parameter as that of before a pending exchange. ``steps``: those of its optimizer at that exchange."""
        self._before = self._before or {name: torch.empty_like(tensor) for name, tensor in self.tensors.items()}
        self._copy(self.tensors, self._before, [index])
        self._steps[index] = steps

    def rescale_to(self, scale: "float | Tensor") -> None:
        """Multiplies what waits, so that it fits gradients of a loss with the factor ``scale``."""
        if isinstance(scale, float) and isinstance(self.scale, float) and scale == self.scale:
            return
        self.multiply(scale / self.scale)
        self.scale = scale

    def multiply(self, factor: "float | Tensor") -> None:
        """Multiplies residuals, thresholds and late means, those of before a pending exchange too."""
        pending = any(steps is not None for steps in self._steps)
        for item in self.spec.tensors:
            if item.name in _IN_UNITS_OF_THE_GRADIENT:
                self.tensors[item.input_name].data.mul_(factor)
                if pending and self._before:
                    self._before[item.input_name].mul_(factor)

    def restart(self, index: int) -> None:
        """Resets threshold and counters of one parameter, those of before a pending exchange too."""
        self.restarts += 1
        for item in self.spec.tensors:
            for tensors in (self.tensors, self._before) if item.name in ("threshold", "counters") else ():
                if item.input_name in tensors:
                    view(tensors[item.input_name], item.parts[index]).data.fill_(item.fill or 0)

    def drain(self, index: int) -> None:
        """Adds the late mean of one parameter to its residual, in the state of before a pending exchange too; see ``entry.fold_late``."""
        parts = {item.name: item.parts[index] for item in self.spec.tensors if not item.stage}
        order = self.spec.orders[index] if self.spec.orders else None
        for tensors in (self.tensors, self._before) if LATE in parts else ():
            if tensors:
                late, residual = (view(tensors[name], parts[name]).data for name in (LATE, "residual"))
                mean = late.nan_to_num(0.0, 0.0, 0.0)
                residual += mean if order is None else order.to_buffer(mean)
                late.zero_()

    def _restore(self, index: int, flag: Tensor) -> None:
        """Restores the state of one parameter where ``flag`` (bool []) is True, without a wait for the device."""
        for item in self.spec.tensors if self._before else ():
            now, before = (view(tensors[item.input_name], item.parts[index]) for tensors in (self.tensors, self._before))
            now.data.copy_(torch.where(flag.to(now.device).reshape(()), before, now))

    def _copy(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor], indices: Sequence[int]) -> None:
        if not indices or not source:
            return
        for item in self.spec.tensors:
            name = item.input_name
            parts = [item.parts[index] for index in indices] if len(indices) < len(self.uses) else [(0, item.shape[0])]
            for part in parts:
                view(target[name], part).data.copy_(view(source[name], part))


def view(tensor: Tensor, part: Part) -> Tensor:
    """Returns the part of a state's tensor that belongs to one parameter."""
    return tensor[part] if isinstance(part, int) else tensor[part[0] : part[1]]
