"""Trains under DDP, for tests that several ranks run, and finds what was lost: neither applied nor kept in a residual."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dct_compile.config import DCTConfig
from dct_compile.integrations.ddp import DDPIntegration
from dct_compile.runtime import RUNTIME
from tests.ranks import digest
from tests.ranks_audit import owned
from tests.ranks_ddp import Options, batch, loss_of


class Balance:
    """Adds up, in float64, the gradients of this rank and what was applied: over all ranks they differ by the residuals."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.local = {name: torch.zeros(parameter.shape).double() for name, parameter in self.parameters.items()}
        self.applied = {name: torch.zeros(parameter.shape).double() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.register_hook(lambda grad, name=name: self._add(name, grad))

    def _add(self, name: str, grad: Tensor) -> None:
        self.local[name] += grad.double()

    def train(self, module: nn.Module, rank: int, steps: range, *arguments: Any) -> list[str]:
        digests = []
        for step in steps:
            module.zero_grad()
            dtype = next(module.parameters()).dtype
            loss_of(module(batch(rank, step, dtype), *arguments)).backward()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    if parameter.grad is not None:
                        self.applied[name] += parameter.grad.double()
                        parameter -= 0.5 * parameter.grad
            digests.append(digest(self.parameters.values()))
        return digests

    def lost(self, state: dict[str, Any]) -> float:
        """The largest element that is neither in what was applied nor in a residual."""
        missing = 0.0
        for name, local in self.local.items():
            total = local.clone()
            if name in state:
                total = total.sub(state[name]["residual"].view(local.shape).double())
            if name in state and "owner" in state[name]:
                elements, held = owned(state[name])
                total.view(-1)[elements] -= held.double()
            dist.all_reduce(total)
            missing = max(missing, float((total / dist.get_world_size() - self.applied[name]).abs().max()))
        return missing


def wrap(model: nn.Module, options: Options, **settings: Any) -> DistributedDataParallel:
    """DDP with the hook that a compilation attaches."""
    module = DistributedDataParallel(model, **settings)
    DDPIntegration().attach(module, DCTConfig(**options), RUNTIME)
    return module
