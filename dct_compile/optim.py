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

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dct_compile.element_order import local_tensor
from dct_compile.first_moment import Factor, FirstMoment, Group, State, first_moment_of, number, register_first_moment, steps_as_ever
from dct_compile.loans import Loans
from dct_compile.moments import Preparation
from dct_compile.state.gradient_use import GradientUse, Use

__all__ = ["Bypass", "FirstMoment", "first_moment_of", "register_first_moment"]

LAST = "dct_last"
"""The key in an optimizer's state of the step at which each element arrived last. The optimizer saves and loads it with its own tensors."""

AS_EVER = "as ever"
"""How a parameter is stepped whose optimizer adapts nothing; see :attr:`dct_compile.state.gradient_use.Use.stepped`."""


class Bypass:
    """Bypasses first moments before every step of every optimizer, for the parameters whose :class:`Use` waits.

    ``tell``: is called once for each optimizer that has such parameters, with the number of those that are stepped without a first moment:
    0 where it is not known. ``adapted``: optimizers that do so whatever the options say, see :func:`dct_compile.adapt`.
    """

    def __init__(self, use: GradientUse, tell: Callable[[Optimizer, int], None]) -> None:
        ours = weakref.ref(self)
        self._use, self._tell, self._loans = use, tell, Loans()
        self._told: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.adapted: weakref.WeakSet[Optimizer] = weakref.WeakSet()

        def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = ours()
            # The first gradients of all may be made by the closure.
            return found.before_step(optimizer, args, kwargs) if found is not None and (use or args[1:] or kwargs) else None

        def after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = ours()
            if found is not None and use:
                found.after_step(optimizer)

        for handle in (register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)):
            weakref.finalize(self, handle.remove)

    # A compiled step calls this as it is: what it decides changes from step to step.
    @_disable_dynamo
    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Sets the first moments; where a closure makes the gradients, when it has done so."""
        by_name = callable(kwargs.get("closure"))
        first = kwargs["closure"] if by_name else args[1] if len(args) > 1 else None
        closure = first if callable(first) else None
        for _, parameter, use in self._uses(optimizer):
            if closure is not None or parameter.grad is not None:
                use.stepped = ""
        if closure is None:
            self.apply(optimizer)
            return None

        def and_apply() -> Any:
            loss = closure()
            self.apply(optimizer)
            return loss

        return (args, {**kwargs, "closure": and_apply}) if by_name else ((args[0], and_apply, *args[2:]), kwargs)

    @_disable_dynamo
    def after_step(self, optimizer: Optimizer) -> None:
        """Looks for parameters that neither ``optimizer`` nor another one inside of its step has adapted to. The next gradients are new."""
        self._loans.take_back(optimizer)
        as_ever = steps_as_ever(optimizer)
        for _, parameter, use in self._uses(optimizer):
            waits, use.exchanged = use.waits and use.exchanged, False
            if use.stepped or parameter.grad is None:
                continue
            if as_ever or not waits:
                use.stepped = AS_EVER
            elif _is_stepped_elsewhere(optimizer, parameter):
                use.stepped = "by another rank"
            else:
                use.stepped = f"unknown optimizer {type(optimizer).__name__}"
                self._tell_once(optimizer, 0)

    @torch.no_grad()
    def apply(self, optimizer: Optimizer) -> None:
        """Sets the first moments of ``optimizer`` for its next step, by the gradients that there are now."""
        self._loans.take_back(optimizer)  # of a step that has raised an error
        moment = first_moment_of(optimizer)
        if moment is None:
            return
        preparation, count = Preparation(optimizer), 0
        made: dict[int, Group] = {}
        for group, parameter, use in self._uses(optimizer):
            if parameter.grad is None:
                continue
            use.stepped = AS_EVER
            if not use.exchanged or not (use.waits or (use.late and optimizer in self.adapted)):
                continue
            state = optimizer.state[parameter]
            if not state and moment.start is not None:
                moment.start(optimizer, group)
            factor = moment.factor(group, state)
            count += factor is not None
            first: tuple[Tensor, Factor] | None = None
            if factor is not None and (state or isinstance(factor, Tensor) or factor != 0):
                if moment.name not in state:
                    made[id(group)] = group
                first = (_first(moment.name, parameter, state), factor)
                if moment.mixes and self._loans.lend(optimizer, group, parameter.grad, state, moment.name, factor):
                    first = None
            has_gaps = bool(moment.second) and _outwaits(use.gap, group["betas"][1])
            step: Factor = 0.0
            second: tuple[Tensor, Tensor] | None = None
            if has_gaps and moment.second in state:
                step = number(state["step"]) + 1
                second = (state[moment.second], last_arrivals(state, parameter, step - 1))
            if first is not None or second is not None:
                preparation.add(parameter, group, step, first, second)
            ways = ["bypass"] * (factor is not None) + ["gaps"] * has_gaps
            use.stepped = " + ".join(ways) or AS_EVER
        for group in made.values():
            _make_beside(optimizer, moment, group, preparation)
        preparation.run()
        if count:
            self._tell_once(optimizer, count)

    def _uses(self, optimizer: Optimizer) -> Iterator[tuple[Group, Tensor, Use]]:
        """Returns the group, the parameter and its record for every compressed parameter of ``optimizer``."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (use := self._use.find(parameter)) is not None:
                    yield group, parameter, use

    def _tell_once(self, optimizer: Optimizer, count: int) -> None:
        if optimizer not in self._told:
            self._told.add(optimizer)
            self._tell(optimizer, count)


def _outwaits(gap: float, beta2: Factor) -> bool:
    """Returns whether ``gap`` steps are more than a second moment looks back; as many, but for the rounding of ``1 - beta2``, are not.

    A moment that keeps nothing of itself (``beta2`` of 0) can hold no share for later steps.
    """
    return bool(beta2 > 0 and gap * (1 - beta2) > 1 + 1e-6)


def _first(name: str, parameter: Tensor, state: State) -> Tensor:
    """Returns the first moment ``name`` of ``parameter``; an optimizer that has not made it yet takes this one."""
    held: Tensor | None = state.get(name)
    if held is None:
        held = state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return held


def _make_beside(optimizer: Optimizer, moment: FirstMoment, group: Group, preparation: Preparation) -> None:
    """Makes the first moments of parameters that are stepped as ever, where a fused step wants all of a group, and some were made."""
    if moment.beside is None or not group.get("fused"):
        return
    for parameter in group["params"]:
        state = optimizer.state[parameter]
        if parameter.grad is not None and state.get(moment.name) is None:
            preparation.add(parameter, group, 0.0, (_first(moment.name, parameter, state), moment.beside(group)), None)


def last_arrivals(state: State, parameter: Tensor, start: Factor) -> Tensor:
    """Returns the step at which each element arrived last, ``start`` for all if nobody knows: int32, a view of the optimizer's state.

    The state holds its bytes. On load, torch casts all state to the dtype of the parameter: bfloat16 is exact up to 256 only.
    """
    held = state.get(LAST)
    if held is None:
        own = local_tensor(parameter)
        steps = torch.empty_like(own, dtype=torch.int32, memory_format=torch.preserve_format).fill_(start)
        held = state[LAST] = _sharded_like(parameter, steps.unsqueeze(-1).view(torch.uint8))
    elif held.dtype != torch.uint8:
        held = state[LAST] = held.to(torch.uint8)
    return local_tensor(held).view(torch.int32).squeeze(-1)


def _sharded_like(parameter: Tensor, own: Tensor) -> Tensor:
    """Returns ``own`` [*part of the parameter, 4] as a DTensor where the parameter is one: a checkpoint takes plain tensors for copies."""
    if not isinstance(parameter, DTensor):
        return own
    shape, stride = (*parameter.shape, 4), (*(4 * size for size in parameter.stride()), 1)
    return DTensor.from_local(own, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _is_stepped_elsewhere(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Returns whether ``optimizer`` is a ``ZeroRedundancyOptimizer`` that leaves ``parameter`` to another rank."""
    found = sys.modules.get("torch.distributed.optim")  # no import, which takes time, where nobody has one
    if found is None or not isinstance(optimizer, found.ZeroRedundancyOptimizer):
        return False
    return bool(optimizer._param_to_rank[parameter] != optimizer.rank)
