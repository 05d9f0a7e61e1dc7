"""Audits compressed data parallelism step by step: what every rank sent is what the invariants of DCT-DP allow, to the bit [Gupta21].

Per parameter, with the local gradient g and the residual E before and E' after a step: W = g + E, and W - E' was sent.
"""

from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dct_compile
from dct_compile.state.entry import share_of
from dct_compile.state.store import named_parameters


class Auditor:
    """Watches the gradients of ``module`` (wrapped by DDP, in DDP, or compiled) from now on; every rank of ``group`` has one."""

    def __init__(
        self, module: nn.Module, density: float, value_dtype: torch.dtype, group: dist.ProcessGroup | None = None, refreshed: bool = False
    ) -> None:
        self.module, self.density, self.value_dtype, self.group, self.refreshed = module, density, value_dtype, group, refreshed
        self.parameters = {name: parameter for name, parameter in named_parameters(module) if parameter.requires_grad}
        self.local: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.received: dict[str, Tensor] = {}
        self.before: dict[str, Any] = {}
        self.compressed: set[str] = set()
        for name, parameter in self.parameters.items():
            parameter.register_hook(lambda grad, name=name: self._add(name, grad))

    def begin(self) -> None:
        """Notes the state before the first backward of a step."""
        self.local.clear()
        self.before = dct_compile.state_dict(self.module)

    def end(self) -> None:
        """Checks a step after its last backward, with the gradients in place."""
        after = dct_compile.state_dict(self.module)
        self.compressed |= after.keys()
        for name, parameter in self.parameters.items():
            grad = self.local.get(name)
            if grad is None:
                grad = torch.zeros_like(parameter)
            self._count(name, grad, parameter.grad)
            if name in after:
                self._check(name, grad.flatten(), parameter.grad, self.before.get(name), after[name])
            else:
                self._check_dense(name, grad, parameter.grad)

    def finish(self) -> None:
        """Checks, after the last step, that all that was received plus the residuals is the sum of all gradients, in float64."""
        state = dct_compile.state_dict(self.module)
        assert self.compressed, "nothing was compressed"
        for name in sorted(self.compressed):  # the same order on all ranks
            pending, expected = state[name]["residual"].double(), self.totals[name].clone()
            if "owner" in state[name]:
                elements, residual = owned(state[name])
                pending[elements] += residual.double()
            dist.all_reduce(expected, group=self.group)
            dist.all_reduce(pending, group=self.group)
            received = self.received[name] * dist.get_world_size(self.group)
            scale = expected.abs().max().item()
            # The parameters' own dtype rounds each step's average once.
            dtype = self.parameters[name].dtype
            rounding = 1e-6 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
            torch.testing.assert_close(received + pending, expected, rtol=0, atol=rounding * scale, msg=lambda m, n=name: f"{n}: {m}")

    def _add(self, name: str, grad: Tensor) -> None:
        held = self.local.get(name)
        self.local[name] = grad.detach().clone() if held is None else held + grad

    def _count(self, name: str, grad: Tensor, averaged: Tensor | None) -> None:
        zero = torch.zeros(grad.numel(), dtype=torch.float64)
        self.totals[name] = self.totals.get(name, zero) + grad.double().flatten()
        self.received[name] = self.received.get(name, zero) + (zero if averaged is None else averaged.double().flatten())

    def _check(self, name: str, grad: Tensor, averaged: Tensor | None, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        held = before["residual"] if before is not None else torch.zeros(grad.numel())
        w = grad.float() + held
        sent = self._check_stage(name, w, after)
        everybody = [torch.empty_like(sent) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everybody, sent, group=self.group)
        total = everybody[0].clone()
        for other in everybody[1:]:
            total += other
        if "owner" in after:
            total = self._check_owners(name, total, before, after)
        if averaged is None:
            assert not total.any(), f"{name}: what was sent reached no gradient"
            return
        expected = (total / len(everybody)).to(averaged.dtype)
        assert torch.equal(averaged.flatten(), expected), f"{name}: the gradient is not the average of what was sent"

    def _check_stage(self, name: str, w: Tensor, stage: dict[str, Tensor]) -> Tensor:
        """Returns what this stage sent (float32), after checking it against W, the new residual and the threshold."""
        residual, threshold = stage["residual"], stage["threshold"].item()
        sent = w - residual
        assert torch.equal(sent.to(self.value_dtype).float(), sent), f"{name}: a value was sent that {self.value_dtype} cannot hold"
        assert torch.equal(sent + residual, w), f"{name}: sent + residual is not gradient + old residual"
        kept = sent != 0
        rounding = 0.0 if self.value_dtype == torch.float32 else torch.finfo(self.value_dtype).eps / 2
        smallest = torch.finfo(self.value_dtype).smallest_normal if rounding else 0.0
        error = residual[kept].abs()
        assert bool((error <= rounding * w[kept].abs().clamp(min=smallest)).all()), f"{name}: a sent entry left more than its rounding"
        assert torch.equal(residual[~kept], w[~kept]), f"{name}: an entry that was not sent is not in the residual"
        assert bool((w[kept].abs() >= threshold).all()), f"{name}: an entry below the threshold was sent"
        overflow = int(stage["counters"][3])
        unsent = w[~kept]
        left_behind = int(((unsent.abs() >= threshold) & (unsent.to(self.value_dtype) != 0)).sum())
        assert left_behind <= overflow, f"{name}: {left_behind} entries above the threshold were not sent, {overflow} were counted"
        assert int(kept.sum()) <= ceil(1.1 * self.density * w.numel()) + 1, f"{name}: more was sent than the payload holds"
        if self.refreshed and not overflow:
            assert int((w.abs() >= threshold).sum()) >= min(ceil(self.density * w.numel()), int((w != 0).sum()))
        return sent

    def _check_owners(self, name: str, total: Tensor, before: dict[str, Any] | None, after: dict[str, Any]) -> Tensor:
        """Checks the owners' stage, where each thresholds the sum of its share once more. Returns what all owners sent together."""
        elements, residual = owned(after)
        held = before["owner"]["residual"] if before is not None else torch.zeros_like(residual)
        mine = torch.zeros_like(total)
        if residual.numel():
            mine[elements] = self._check_stage(name, total[elements] + held, after["owner"])
        dist.all_reduce(mine, group=self.group)
        return mine

    def _check_dense(self, name: str, grad: Tensor, averaged: Tensor | None) -> None:
        total = grad.double().clone()
        dist.all_reduce(total, group=self.group)
        if averaged is not None:
            tolerance = 4 * torch.finfo(grad.dtype).eps
            torch.testing.assert_close(averaged.double(), total / dist.get_world_size(self.group), rtol=tolerance, atol=1e-12)


def owned(entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns which elements of the parameter this rank's share holds, and their residual."""
    return share_of(entry["residual"].numel(), entry["owner_share"]), entry["owner"]["residual"]
