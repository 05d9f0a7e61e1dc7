"""Learns what becomes of gradients: an optimizer applies them, or they are discarded (``zero_grad`` without a step).

torch calls two hooks around every step of every optimizer. No hook tells of ``zero_grad``: its effect is seen when the next backward
begins. The factor of the loss is noted then, too, because the gradient contains it.
"""

import gc
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dct_compile.element_order import local_tensor
from dct_compile.state.loss_scale import NO_BACKWARD, loss_scales


@dataclass(eq=False)
class Use:
    """The fate of one parameter's gradients.

    ``steps``: grows with every optimizer step that applies its gradient. ``optimizer``: that of the last such step, or found before the
    first one. ``scale``: the factor of the loss in its last backward. ``absent``: whether its gradient was ``None`` or zero at the begin
    of a backward since the last exchange (on a GPU a bool tensor). ``blank``: whether what the last exchange handed out was zero, as late
    means are at first: then zeros do not tell of a discarded gradient. ``task``: the backward pass that looked last. ``skipped``: a tensor
    that is not zero where a fused optimizer left out its last step. ``version``: that of the parameter at the last exchange of its
    gradient, ``None`` before the first. ``searches``: how often an optimizer was searched for.

    For :mod:`dct_compile.optim`. ``late``: whether an element of its gradient arrives once in many steps, with all that has added up.
    ``waits``: whether its optimizer is to adapt to that. ``exchanged``: whether it was compressed since the last step: if not, as in
    ``no_sync`` or under another wrapper, the gradient is dense, and steps as ever. ``gap``: the steps that an element waits, as far as the
    second moment is to know. ``stepped``: how the last step has treated it: "bypass", "gaps", "bypass + gaps", "as ever",
    "by another rank", or "unknown optimizer" with its name. Empty before the first step.

    For :mod:`dct_compile.state.exchanges`. ``exchanges``: how often the gradient was exchanged, ``None`` where nobody counts. ``agreed``:
    whether the ranks have compared that number.
    """

    parameter: "weakref.ref[Tensor]"
    steps: int = 0
    optimizer: "weakref.ref[Optimizer] | None" = None
    scale: "float | Tensor" = 1.0
    absent: "bool | Tensor" = False
    blank: "bool | Tensor" = False
    task: int = NO_BACKWARD
    skipped: Tensor | None = None
    version: int | None = None
    searches: int = 0
    late: bool = False
    waits: bool = False
    exchanged: bool = False
    gap: float = 0.0
    stepped: str = ""
    exchanges: int | None = None
    agreed: bool = False

    @property
    def has_optimizer(self) -> bool:
        return self.steps > 0 or (self.optimizer is not None and self.optimizer() is not None)

    @property
    def is_due(self) -> bool:
        """Whether to search for its optimizer: at the first backward, and once more at the second if there was none."""
        return not self.has_optimizer and self.searches < (1 if self.version is None else 2)

    @property
    def changed(self) -> bool:
        """Whether somebody has written to the parameter since the last exchange of its gradient, though no optimizer of torch has it."""
        parameter = self.parameter()
        return parameter is not None and parameter._version != self.version

    def note_exchange(self) -> None:
        """Notes that the parameter's gradient is exchanged now."""
        parameter = self.parameter()
        self.absent = self.blank = False
        self.exchanged = True
        self.version = parameter._version if parameter is not None else None


class GradientUse:
    """The fate of the gradients of all parameters that are compressed."""

    def __init__(self) -> None:
        self._uses: dict[int, Use] = {}
        self._scales = loss_scales()
        ours = weakref.ref(self)
        self._handles = [
            register_optimizer_step_pre_hook(lambda *step: _forward(ours, GradientUse._before_step, *step)),
            register_optimizer_step_post_hook(lambda *step: _forward(ours, GradientUse._after_step, *step)),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def of(self, parameters: Iterable[Tensor]) -> list[Use]:
        """Returns the record of each parameter, made on first use."""
        found = []
        for parameter in parameters:
            use = self._uses.get(id(parameter))
            if use is None or use.parameter() is not parameter:
                use = Use(weakref.ref(parameter, self._forget(id(parameter))))
                self._uses[id(parameter)] = use
            found.append(use)
        return found

    def __bool__(self) -> bool:
        """Returns whether any parameter of this process is compressed."""
        return bool(self._uses)

    def find(self, parameter: Tensor) -> Use | None:
        """Returns the record of ``parameter``, if there is one."""
        use = self._uses.get(id(parameter))
        return use if use is not None and use.parameter() is parameter else None

    def watch(self, parameters: Sequence[Tensor]) -> list[RemovableHandle]:
        """Looks at the gradients of ``parameters`` at the begin of every backward, before any of them changes.

        Returns:
            The handles of the parameters' hooks.
        """
        held, last = [weakref.ref(parameter) for parameter in parameters], NO_BACKWARD

        def at_gradient(_: Tensor) -> None:
            nonlocal last
            task = torch._C._current_graph_task_id()
            if task != last:
                last = task
                self.look([found for ref in held if (found := ref()) is not None])

        return [parameter.register_hook(at_gradient) for parameter in parameters if parameter.requires_grad]

    def look(self, parameters: Iterable[Tensor]) -> None:
        """Notes whether ``parameters`` have gradients now, and the factor of the loss whose backward begins.

        Within one backward pass only the first look at a parameter counts.
        """
        task, scale = torch._C._current_graph_task_id(), self._scales.present()
        uses = [use for use in self.of(parameters) if use.task != task or task == NO_BACKWARD]
        if any(use.is_due for use in uses):
            self._search()
        groups: dict[int, list[Use]] = {}
        for use in uses:
            use.task, use.scale = task, use.scale if scale is None else scale
            groups.setdefault(id(use.optimizer() if use.optimizer is not None else None), []).append(use)
        for group in groups.values():
            # zero_grad leaves none, or only zeros: one gradient with another value stands for its optimizer's others.
            _note(group)

    def _search(self) -> None:
        """Finds the optimizers of parameters that no optimizer has stepped yet."""
        waiting = {key: use for key, use in list(self._uses.items()) if use.is_due}  # other threads add some
        for optimizer in _optimizers():
            for parameter in _parameters(optimizer):
                if id(parameter) in waiting:
                    waiting[id(parameter)].optimizer = weakref.ref(optimizer)
        for use in waiting.values():
            use.searches += 1

    # A compiled step calls this as it is: the numbers change with every step.
    @_disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(callable(item) for item in (*args, *kwargs.values())):  # a closure makes the gradients within the step
            self._note_step(optimizer)

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._note_step(optimizer)

    def _note_step(self, optimizer: Optimizer) -> None:
        used = [
            use
            for parameter in _parameters(optimizer)
            if (use := self._uses.get(id(parameter))) is not None and parameter.grad is not None and use.parameter() is parameter
        ]
        if not used:
            return
        skipped = getattr(optimizer, "found_inf", None)  # of a fused optimizer, which decides on the device
        for use in used:
            use.steps += 1
            use.optimizer, use.skipped = weakref.ref(optimizer), skipped

    def _forget(self, key: int) -> Callable[[Any], None]:
        uses = self._uses

        def forget(ref: "weakref.ref[Tensor]") -> None:
            if key in uses and uses[key].parameter is ref:
                del uses[key]

        return forget


def _forward(ours: "weakref.ref[GradientUse]", method: Callable[..., None], *step: Any) -> None:
    found = ours()
    if found:  # something is compressed in this process
        method(found, *step)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _note(group: Sequence[Use]) -> None:
    # Of a DTensor this rank's part: all of it would be looked at by a collective.
    held = [parameter.grad if (parameter := use.parameter()) is not None else None for use in group]
    gradients = [local_tensor(gradient) if gradient is not None else None for gradient in held]
    kept: bool | Tensor = False
    for gradient in gradients:
        if gradient is not None and kept is not True:
            kept = _combined(operator.or_, kept, gradient.any() if gradient.is_cuda else bool(gradient.any()))
    blank: bool | Tensor = any(gradient is not None for gradient in gradients)
    for use, gradient in zip(group, gradients, strict=True):
        if gradient is not None and blank is not False:
            blank = _combined(operator.and_, blank, use.blank)
    kept = _combined(operator.or_, kept, blank)
    for use, gradient in zip(group, gradients, strict=True):
        absent = gradient is None or (~kept if isinstance(kept, Tensor) else not kept)
        use.absent = absent if use.absent is False or absent is True else use.absent | absent


def _combined(function: Callable[[Any, Any], Any], first: "bool | Tensor", second: "bool | Tensor") -> "bool | Tensor":
    """Returns ``function`` of both, on the device of the first that is on one: the host waits for none."""
    return function(first, second.to(first.device) if isinstance(first, Tensor) and isinstance(second, Tensor) else second)  # type: ignore[no-any-return]


def _optimizers() -> list[Optimizer]:
    """Returns all optimizers of the process."""
    return [item for item in gc.get_objects() if issubclass(type(item), Optimizer) and hasattr(item, "param_groups")]
