"""Optimizers and their schedules. torch is imported when one starts: the help of ``dct train`` reads the numbers without it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

OPTIMIZERS = ("adagrad", "adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Optimization:
    """An optimizer of OPTIMIZERS and how its learning rate changes.

    ``momentum`` is that of SGD, ``betas`` are those of Adam and AdamW; the others have none. ``warmup``: steps in which the learning rate
    rises to ``lr``. ``schedule``: one of SCHEDULES. ``"cosine"``: the rate falls to zero along half a cosine until the last step.
    """

    optimizer: str
    lr: float
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "constant"

    def start(self, parameters: Iterable["nn.Parameter"], steps: int) -> tuple["Optimizer", "LambdaLR"]:
        """Returns the optimizer of a training of ``steps`` steps and its schedule, both of which are stepped once per step.

        Raises ``ValueError`` for a name that is not in OPTIMIZERS or SCHEDULES.
        """
        from torch.optim.lr_scheduler import LambdaLR

        optimizer = self._optimizer(parameters)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, steps))

    def factor(self, step: int, steps: int) -> float:
        """Returns the learning rate of ``step`` (from 0) as a fraction of ``lr``. Raises ``ValueError`` for an unknown schedule."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        match self.schedule:
            case "constant":
                return rising
            case "cosine":
                return rising * 0.5 * (1 + math.cos(math.pi * step / steps))
        raise ValueError(f"unknown schedule {self.schedule!r}: there are {', '.join(SCHEDULES)}")

    def _optimizer(self, parameters: Iterable["nn.Parameter"]) -> "Optimizer":
        import torch

        lr, decay = self.lr, self.weight_decay
        match self.optimizer:
            case "adagrad":
                return torch.optim.Adagrad(parameters, lr=lr, weight_decay=decay, fused=True)
            case "adam":
                return torch.optim.Adam(parameters, lr=lr, betas=self.betas, weight_decay=decay, fused=True)
            case "adamw":
                return torch.optim.AdamW(parameters, lr=lr, betas=self.betas, weight_decay=decay, fused=True)
            case "sgd":
                return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum, weight_decay=decay, fused=True)
        raise ValueError(f"unknown optimizer {self.optimizer!r}: there are {', '.join(OPTIMIZERS)}")
