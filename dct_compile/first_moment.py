"""The first moments of optimizers: where they are, and the value from which a step comes out as if there was none."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import ASGD, LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, Muon, NAdam, Optimizer, RAdam, RMSprop, Rprop

Factor = float | Tensor
Group = Mapping[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class FirstMoment:
    """The first moment of an optimizer.

    ``name``: its key in the state of a parameter. ``factor``: returns the multiple of the gradient to which it is set before a step, by the
    parameter's group and state; ``None`` where it plays no part. With an empty state 0.0 leaves it to the optimizer, which makes its state
    all at once and starts with zeros. ``second``: the key of a second moment that forgets by ``betas[1]``, if the optimizer has one.
    ``start``: makes the states of a group as the first step would, for an optimizer whose first step needs another value than zero.
    ``beside``: returns the multiple of the gradient from which a first step comes out as ever, by the parameter's group, for an optimizer
    whose fused step wants to find the first moments of all parameters of a group or of none. ``mixes``: whether the step mixes the gradient
    into its moment (``lerp``) and does not change the gradient: where both are equal, they may be one tensor (``loans.py``).
    """

    name: str
    factor: Callable[[Group, State], Factor | None]
    second: str = ""
    start: Callable[[Optimizer, Group], None] | None = None
    beside: Callable[[Group], Factor] | None = None
    mixes: bool = False


def _of_adam(group: Group, state: State) -> Factor | None:
    beta1: Factor = group["betas"][0]
    if beta1 == 0:
        return None
    factor: Factor = 1 - beta1 ** number(state["step"]) if state else 0.0
    return factor


def _of_nadam(group: Group, state: State) -> Factor | None:
    beta1: Factor = group["betas"][0]
    decay = group["momentum_decay"]
    if beta1 == 0:
        return None
    step = number(state["step"]) + 1
    now, following = (beta1 * (1.0 - 0.5 * 0.96 ** (count * decay)) for count in (step, step + 1))
    product = number(state["mu_product"] * now)  # rounded as the step does
    # The step applies  following / (1 - product * following) * exp_avg + (1 - now) / (1 - product) * g.
    after = (1 - (1 - now) / (1 - product)) * (1 - product * following) / following
    factor: Factor = (after - (1 - beta1)) / beta1
    return factor


def _start_nadam(optimizer: Optimizer, group: Group) -> None:
    collected = len(inspect.signature(NAdam._init_group).parameters) - 2  # lists for the step, beside the optimizer and the group
    optimizer._init_group(group, *([] for _ in range(collected)))  # type: ignore[attr-defined]


def _of_sgd(group: Group, state: State) -> Factor | None:
    momentum, dampening = group["momentum"], group["dampening"]
    if momentum == 0 or momentum >= 1:  # from 1 on one gradient is applied without end
        return None
    # The step makes  momentum * buffer + (1 - dampening) * g  of it, and with nesterov applies  g + momentum * that.
    wanted = (1 - dampening) / (1 - momentum)
    factor: Factor = (wanted - (1 - dampening)) / momentum
    return factor


def _beside_sgd(group: Group) -> Factor:
    beside: Factor = group["dampening"] / group["momentum"]  # a first step takes the whole gradient
    return beside


_ADAM = FirstMoment("exp_avg", _of_adam, "exp_avg_sq", mixes=True)
_KNOWN: dict[type[Optimizer], FirstMoment] = {
    Adam: _ADAM,
    RAdam: _ADAM,
    Adamax: FirstMoment("exp_avg", _of_adam, mixes=True),
    NAdam: FirstMoment("exp_avg", _of_nadam, "exp_avg_sq", _start_nadam),
    SGD: FirstMoment("momentum_buffer", _of_sgd, beside=_beside_sgd),
}
_AS_EVER = (Adadelta, Adafactor, Adagrad, ASGD, LBFGS, Muon, Rprop)
"""The optimizers of torch that have no first moment, and Muon: it applies the orthogonal factor of its momentum, to which many sparse
gradients contribute more than one. RMSprop has a first moment where its momentum is not zero. SparseAdam takes sparse gradients alone,
which are never compressed."""


def register_first_moment(optimizer: type[Optimizer], moment: FirstMoment) -> None:
    """Declares the first moment of an optimizer class, so that it can be bypassed.

    For example ``register_first_moment(Lion, FirstMoment("exp_avg", lambda group, state: 1.0 if state else 0.0))``: Lion applies the sign
    of a mean of its moment and the gradient, which is the sign of the gradient where both are the same.

    Args:
        optimizer: The class. Classes that inherit its ``step`` are covered as well.
        moment: Where it is, and the multiple of the gradient that it is set to before a step.
    """
    _KNOWN[optimizer] = moment


def first_moment_of(optimizer: Optimizer) -> FirstMoment | None:
    """Returns the first moment of ``optimizer``, if it is known. A class that inherits the step of a known one is known, too."""
    step = inspect.unwrap(type(optimizer).step)
    return next((moment for known, moment in _KNOWN.items() if inspect.unwrap(known.step) is step), None)


def steps_as_ever(optimizer: Optimizer) -> bool:
    """Returns whether ``optimizer`` is known to have no first moment, or one that is better kept."""
    if isinstance(optimizer, RMSprop):
        return all(group["momentum"] == 0 for group in optimizer.param_groups)
    return isinstance(optimizer, _AS_EVER)


def added_decay(group: Group) -> Factor:
    """Returns the weight decay that an optimizer adds to the gradient."""
    decay: Factor = 0.0 if group.get("decoupled_weight_decay", False) else group.get("weight_decay", 0.0)
    return decay


def number(step: Factor) -> Factor:
    """Returns a step count as a number where that needs no wait for a device."""
    return step.item() if isinstance(step, Tensor) and step.device.type == "cpu" else step
