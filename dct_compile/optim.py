"""Lets optimizers apply gradients that have waited: their first moment is bypassed for parameters that are sent a few elements at a time.

An element that arrives carries the sum of all gradients since it was sent last. This is a momentum already. A first moment on top of it
would spread the sum over ten more steps, when it is old. So before the step of an optimizer, its first moment is set to the value from
which the step comes out as if there was none::

    Adam     exp_avg = (1 - beta1^(t-1)) * g     the step makes (1 - beta1^t) * g of it, and g of that
    SGD      momentum_buffer = g / (1 - momentum)     the step applies the same: the sum of all that momentum makes of one gradient

The second moment forgets within ``1 / (1 - beta2)`` steps. Where an element waits longer than that, each arrival would look like the first
one, and too large. Its square is then spread over the ``gap`` steps that it has waited: the moment gets ``(1 - beta2^gap) / gap * g^2``
instead of ``(1 - beta2) * g^2``.

The kernels of the optimizer stay as they are: for-loop, foreach, fused, capturable and compiled. ``g`` includes the weight decay that the
optimizer adds to the gradient.
"""

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dct_compile.moments import Factor, Group, Preparation
from dct_compile.state.gradient_use import GradientUse

State = dict[str, Any]


LAST = "dct_last"
"""The key in an optimizer's state of the step at which each element arrived last. The optimizer saves and loads it with its own tensors."""


@dataclass(frozen=True)
class FirstMoment:
    """The first moment of an optimizer.

    ``name``: its key in the state of a parameter. ``factor``: returns the multiple of the gradient to which it is set before a step, by the
    parameter's group and state; ``None`` where it plays no part. ``second``: the key of a second moment that forgets by ``betas[1]``, if
    the optimizer has one.
    """

    name: str
    factor: Callable[[Group, State], Factor | None]
    second: str = ""


def _of_adam(group: Group, state: State) -> Factor | None:
    beta1: Factor = group["betas"][0]
    if not state or beta1 == 0:
        return None
    factor: Factor = 1 - beta1 ** _number(state["step"])
    return factor


def _of_nadam(group: Group, state: State) -> Factor | None:
    beta1: Factor = group["betas"][0]
    decay = group["momentum_decay"]
    if not state or beta1 == 0:  # the first step makes its state itself, and keeps its first moment
        return None
    step = _number(state["step"]) + 1
    now, following = (beta1 * (1.0 - 0.5 * 0.96 ** (count * decay)) for count in (step, step + 1))
    product = _number(state["mu_product"]) * now
    # The step applies  following / (1 - product * following) * exp_avg + (1 - now) / (1 - product) * g.
    after = (1 - (1 - now) / (1 - product)) * (1 - product * following) / following
    factor: Factor = (after - (1 - beta1)) / beta1
    return factor


def _of_sgd(group: Group, state: State) -> Factor | None:
    momentum, dampening = group["momentum"], group["dampening"]
    if momentum == 0:
        return None
    # The step makes  momentum * buffer + (1 - dampening) * g  of it, and with nesterov applies  g + momentum * that.
    wanted = (1 - dampening) / (1 - momentum)
    factor: Factor = (wanted - (1 - dampening)) / momentum
    return factor


_ADAM = FirstMoment("exp_avg", _of_adam, "exp_avg_sq")
_KNOWN: dict[type[Optimizer], FirstMoment] = {
    Adam: _ADAM,
    RAdam: _ADAM,
    Adamax: FirstMoment("exp_avg", _of_adam),
    NAdam: FirstMoment("exp_avg", _of_nadam, "exp_avg_sq"),
    SGD: FirstMoment("momentum_buffer", _of_sgd),
}
_WITHOUT = (Adadelta, Adafactor, Adagrad, ASGD, LBFGS, Rprop)
"""The optimizers of torch that have no first moment. RMSprop has one where its momentum is not zero."""


def register_first_moment(optimizer: type[Optimizer], moment: FirstMoment) -> None:
    """Declares the first moment of an optimizer class, so that it can be bypassed.

    For example ``register_first_moment(Lion, FirstMoment("exp_avg", lambda group, state: 1.0))``: Lion applies the sign of a mean of its
    moment and the gradient, which is the sign of the gradient where both are the same.

    Args:
        optimizer: The class. Classes that inherit its ``step`` are covered as well.
        moment: Where it is, and the multiple of the gradient that it is set to before a step.
    """
    _KNOWN[optimizer] = moment


def first_moment_of(optimizer: Optimizer) -> FirstMoment | None:
    """Returns the first moment of ``optimizer``, if it is known. A class that inherits the step of a known one is known, too."""
    step = inspect.unwrap(type(optimizer).step)
    return next((moment for known, moment in _KNOWN.items() if inspect.unwrap(known.step) is step), None)


class Bypass:
    """Bypasses first moments before every step of every optimizer, for the parameters whose :class:`Use` waits.

    ``tell``: is called once for each optimizer that has such parameters, with the number of those that are stepped without a first moment:
    0 where it is not known. ``adapted``: optimizers that do so whatever the options say, see :func:`dct_compile.adapt`.
    """

    def __init__(self, use: GradientUse, tell: Callable[[Optimizer, int], None]) -> None:
        ours = weakref.ref(self)
        self._use, self._tell = use, tell
        self._told: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.adapted: weakref.WeakSet[Optimizer] = weakref.WeakSet()

        def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = ours()
            return found.before_step(optimizer, args, kwargs) if found is not None else None

        def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = ours()
            if found is not None:
                found.after_step(optimizer)

        for handle in (register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)):
            weakref.finalize(self, handle.remove)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sets the first moments; where a closure makes the gradients, when it has done so."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.apply(optimizer)
            return None

        def and_apply() -> Any:
            loss = closure()
            self.apply(optimizer)
            return loss

        return (args[0], and_apply, *args[2:]) if len(args) > 1 else args, {
            **kwargs,
            "closure": and_apply,
        } if "closure" in kwargs else kwargs

    def after_step(self, optimizer: Optimizer) -> None:
        """Looks for parameters that neither ``optimizer`` nor another one inside of its step has adapted to."""
        if not self._use or first_moment_of(optimizer) is not None or isinstance(optimizer, _WITHOUT):
            return
        if isinstance(optimizer, RMSprop) and all(group["momentum"] == 0 for group in optimizer.param_groups):
            return
        uses = [use for group in optimizer.param_groups for parameter in group["params"] if (use := self._use.find(parameter)) is not None]
        if any(use.waits and not use.adapted for use in uses):
            self._tell_once(optimizer, 0)

    @torch.no_grad()
    def apply(self, optimizer: Optimizer) -> None:
        """Sets the first moments of ``optimizer`` for its next step, by the gradients that there are now."""
        moment = first_moment_of(optimizer) if self._use else None
        if moment is None:
            return
        preparation, count = Preparation(optimizer), 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                use = self._use.find(parameter)
                if use is None or parameter.grad is None or not (use.waits or (use.late and optimizer in self.adapted)):
                    continue
                use.adapted = True
                state = optimizer.state[parameter]
                factor = moment.factor(group, state)
                count += factor is not None
                first = None if factor is None else (_first(moment.name, parameter, state), factor)
                second: tuple[Tensor, Tensor] | None = None
                step: Factor = 0.0
                # A second moment that keeps nothing of itself (beta2 = 0) can hold no share for later steps.
                if moment.second in state and group["betas"][1] > 0 and use.gap > 1 / (1 - group["betas"][1]):
                    step = _number(state["step"]) + 1
                    second = (state[moment.second], _last(parameter, state, step))
                if first is not None or second is not None:
                    preparation.add(parameter, group, step, first, second)
        preparation.run()
        if count:
            self._tell_once(optimizer, count)

    def _tell_once(self, optimizer: Optimizer, count: int) -> None:
        if optimizer not in self._told:
            self._told.add(optimizer)
            self._tell(optimizer, count)


def _first(name: str, parameter: Tensor, state: State) -> Tensor:
    """Returns the first moment ``name`` of ``parameter``; an optimizer that has not made it yet takes this one."""
    held: Tensor | None = state.get(name)
    if held is None:
        held = state[name] = torch.empty_like(parameter, memory_format=torch.preserve_format)
    return held


def _last(parameter: Tensor, state: State, step: Factor) -> Tensor:
    """Returns the steps at which the elements of ``parameter`` arrived last: before ``step``, where that is not known."""
    last: Tensor | None = state.get(LAST)
    if last is None:
        last = torch.empty_like(parameter, dtype=torch.int32, memory_format=torch.preserve_format).fill_(step - 1)
    elif last.dtype != torch.int32:  # an optimizer that loads a state gives it the dtype of the parameter
        last = last.float().clamp_(0, 2**24).round_().to(torch.int32)
    state[LAST] = last
    return last


def _number(step: Factor) -> Factor:
    """Returns a step count as a number where that needs no wait for a device."""
    return step.item() if isinstance(step, Tensor) and step.device.type == "cpu" else step
