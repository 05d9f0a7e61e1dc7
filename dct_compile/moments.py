"""Prepares the moments of an optimizer for its step by few calls of one operator, whatever the number of parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dct_compile.element_order import local_tensor
from dct_compile.first_moment import Factor, Group, added_decay, number
from dct_compile.ops import prepare_moments
from dct_compile.triton_kernels.moments import spread_shares


@dataclass(frozen=True)
class _Batch:
    """Parameters of which all numbers are the same: each list has one tensor for each, or none."""

    grads: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)


class Preparation:
    """The moments that are to be prepared for one step of ``optimizer``. Nothing changes before `run`."""

    def __init__(self, optimizer: Optimizer) -> None:
        # A fused optimizer divides the gradients by the one, and leaves out its step where the other is not 0.
        self._scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        self._skipped: Tensor | None = getattr(optimizer, "found_inf", None)
        self._batches: dict[tuple[Any, ...], _Batch] = {}
        self._groups: dict[int, Group] = {}

    def add(
        self, parameter: Tensor, group: Group, step: Factor, first: tuple[Tensor, Factor] | None, second: tuple[Tensor, Tensor] | None
    ) -> None:
        """Adds a parameter.

        Args:
            parameter: With a gradient.
            group: Its group.
            step: The number of the step to come, from 1 on, if there is a second moment.
            first: The first moment, and the multiple of the gradient to which it is set.
            second: The second moment whose new squares are spread, and the step (int32) at which each element arrived last.
        """
        factor = None if first is None else first[1]
        self._groups[id(group)] = group
        # Tensors differ: their values are not looked at.
        key = (id(group), parameter.device, parameter.dtype, step, factor, second is None)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = _Batch()
        assert parameter.grad is not None
        batch.grads.append(local_tensor(parameter.grad))
        if added_decay(group) != 0:
            batch.parameters.append(local_tensor(parameter))
        if first is not None:
            batch.first.append(local_tensor(first[0]))
        if second is not None:
            batch.second.append(local_tensor(second[0]))
            batch.last.append(second[1])

    def run(self) -> None:
        """Changes the moments."""
        for (group_id, device, dtype, step, factor, is_plain), batch in self._batches.items():
            group, wide = self._groups[group_id], torch.float64 if dtype == torch.float64 else torch.float32
            unscale = (-1 if group.get("maximize") else 1) / (1.0 if self._scale is None else self._scale.to(device))
            skipped = 0.0 if self._skipped is None else self._skipped
            scalars = _tensor((0.0 if factor is None else factor, unscale, added_decay(group), step, skipped), wide, device)
            shares = None if is_plain else spread_shares(float(group["betas"][1]), torch.finfo(dtype).eps, wide, device)
            prepare_moments(scalars, shares, batch.grads, batch.parameters, batch.first, batch.second, batch.last)


def _tensor(numbers: Sequence[Factor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the numbers as one tensor on ``device``. Those that are on a GPU already stay there, and none makes the host wait."""
    known = [number(held) for held in numbers]
    if device.type == "cpu":
        return torch.tensor(known, dtype=dtype, device=device)
    made = [held if isinstance(held, Tensor) else torch.full((), held, dtype=dtype, device=device) for held in known]
    return torch.stack([held.to(device, dtype).reshape(()) for held in made])
