"""Lends gradients to an optimizer for one step, in the place of first moments that would be set to the same values. So nothing is copied.

Before step t a bypassed moment of Adam is ``(1 - beta1^(t-1)) * g``. After some hundred steps this is ``g``. The step mixes the gradient
into its moment, which is the gradient itself, and changes nothing. The optimizer's own moment is zero meanwhile, and comes back after.
"""

import weakref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.first_moment import Factor, Group, State, added_decay

_ROUNDS_TO_ONE = 1 - 2.0**-25
"""From here on a number is 1 in float32, in which moments are computed unless they are float64."""
_STATIC = "_dynamo_static_input_type"
"""What torch.compile notes at the tensors of a compiled step, which would be compiled again for other ones."""
_SET, _NEVER = -1, -2
"""In place of the version of a moment that is zero: it was set to the gradient, and it is not to be replaced."""


class Loans:
    """The gradients that are lent to optimizers now, and the moments that they stand for."""

    def __init__(self) -> None:
        self._open: weakref.WeakKeyDictionary[Optimizer, list[tuple[State, str, Tensor]]] = weakref.WeakKeyDictionary()
        # The version of each moment that is zero. A moment is replaced at its second step at the earliest: the first one may compile.
        self._zeros = WeakTensorKeyDictionary()

    def lend(self, optimizer: Optimizer, group: Group, gradient: Tensor, state: State, name: str, factor: Factor) -> bool:
        """Puts ``gradient`` in the place of the first moment ``name`` of ``state``, if that would be set to the same values.

        Args:
            optimizer: The optimizer that is about to step.
            group: The group of the parameter.
            gradient: The gradient of the parameter.
            state: The state of the parameter.
            name: The key of the first moment.
            factor: The multiple of the gradient to which the moment would be set.

        Returns:
            False if the moment is still to be set.
        """
        moment = state[name]
        version = self._zeros.get(moment)
        equal = _is_the_gradient(optimizer, group, factor, moment.dtype.itemsize) and _alike(moment, gradient)
        if not equal or version in (None, _NEVER) or hasattr(moment, _STATIC):
            self._zeros[moment] = _NEVER if version == _NEVER else _SET
            return False
        if version != moment._version:
            self._zeros[moment] = moment.zero_()._version
        state[name] = gradient
        self._open.setdefault(optimizer, []).append((state, name, moment))
        return True

    def take_back(self, optimizer: Optimizer) -> None:
        """Puts the moments of ``optimizer`` back in their places."""
        for state, name, moment in self._open.pop(optimizer, []):
            if hasattr(state[name], _STATIC):
                self._zeros[moment] = _NEVER
            state[name] = moment


def _is_the_gradient(optimizer: Optimizer, group: Group, factor: Factor, itemsize: int) -> bool:
    """Returns whether a moment of ``factor`` times what ``optimizer`` takes as gradient is the gradient itself."""
    if isinstance(factor, Tensor) or factor < (1 if itemsize == 8 else _ROUNDS_TO_ONE):
        return False
    if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):  # a fused step scales the gradient itself
        return False
    return not group.get("maximize") and not group.get("differentiable") and bool(added_decay(group) == 0)


def _alike(moment: Tensor, gradient: Tensor) -> bool:
    """Returns whether two plain tensors on a CPU have the same layout, and the version of ``moment`` is known."""
    plain = type(moment) is type(gradient) is Tensor and gradient.device.type == "cpu" and gradient.layout == moment.layout
    if not plain or moment.is_inference() or gradient.requires_grad:
        return False
    return moment.dtype == gradient.dtype and moment.stride() == gradient.stride()
