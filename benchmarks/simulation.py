"""Compressed data-parallel training, simulated in one process: exact top-k per parameter with error feedback, in plain PyTorch.

It follows "gather": each simulated rank adds its residual, sends the largest entries, and keeps the rest. The optimizer is torch's own. The
rules for its moments are those of `dct_compile/optim.py`. The product chooses thresholds on a schedule instead of exactly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dct_compile.triton_kernels.layout import TILE, GradientLayout, choose_block
from dct_compile.triton_kernels.threshold_pack import LARGEST_CODE

CAPACITY = 1.1
"""Entries for which a payload has room, per entry that is asked for: the default of the option `capacity_factor`."""
ROW_INDEX_BYTES = 2


@dataclass(frozen=True)
class Method:
    """How gradients are compressed.

    ``power``: entries are chosen by ``|W| / v^(power / 2)``, with ``v`` the second moment. ``rows``: parts of the names of the tables that
    are sent by whole rows, chosen by their norms. ``exempt``: parts of the names of what stays dense. ``dense_steps``: steps before the
    compression starts.
    """

    density: float = 0.01
    bypass: bool = True
    gaps: bool = False
    power: float = 0.0
    int8: bool = False
    rows: tuple[str, ...] = ()
    exempt: tuple[str, ...] = ()
    dense_steps: int = 0


class Simulation:
    """Averages the gradients of all simulated ranks as ``method`` says, and steps ``optimizer``.

    Parameters under ``min_numel`` elements stay dense.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, method: Method, ranks: int, min_numel: int) -> None:
        self.optimizer, self.method, self.ranks, self.count = optimizer, method, ranks, 0
        self.names, self.parameters = zip(*model.named_parameters(), strict=True)
        self.compressed = [
            method.density < 1 and parameter.numel() >= min_numel and not _any_in(method.exempt, name)
            for name, parameter in model.named_parameters()
        ]
        self.residuals = [[torch.zeros_like(parameter) for _ in range(ranks)] for parameter in self.parameters]
        self.last = [torch.zeros_like(parameter) for parameter in self.parameters]

    def step(self, losses: Iterable[Tensor]) -> None:
        """Trains one step on the ``losses`` of the ranks, one for each. They are computed as they are asked for."""
        grads = [torch.autograd.grad(loss, self.parameters) for loss in losses]
        self.count += 1
        with torch.no_grad():
            for position, own in enumerate(zip(*grads, strict=True)):
                waits = self.compressed[position] and self.count > self.method.dense_steps
                sent = [self._send(position, rank, grad) for rank, grad in enumerate(own)] if waits else own
                self.parameters[position].grad = torch.stack(tuple(sent)).mean(dim=0)
                if waits:
                    self._adapt(position)
        self.optimizer.step()

    def _send(self, position: int, rank: int, grad: Tensor) -> Tensor:
        residual = self.residuals[position][rank].add_(grad)
        sent = self._rounded(torch.where(self._chosen(position, residual), residual, 0.0))
        residual.sub_(sent)
        return sent

    def _chosen(self, position: int, w: Tensor) -> Tensor:
        """Returns which entries of ``w`` are sent: bool, like ``w``."""
        name, parameter, method = self.names[position], self.parameters[position], self.method
        if _any_in(method.rows, name):
            return _largest(w.norm(dim=1), rows_for(parameter, method.density)).unsqueeze(1)
        score, state = w.abs(), self.optimizer.state[parameter]
        if method.power and state:
            score = score / (state["exp_avg_sq"].sqrt() + 1e-8) ** method.power
        return _largest(score, ceil(method.density * w.numel()))

    def _rounded(self, sent: Tensor) -> Tensor:
        if not self.method.int8:
            return sent.bfloat16().float()
        tiles = nn.functional.pad(sent.flatten(), (0, -sent.numel() % TILE)).view(-1, TILE)
        scales = tiles.abs().amax(dim=1, keepdim=True) / LARGEST_CODE
        codes = torch.where(scales > 0, tiles / scales, 0.0).round()
        return (codes * scales).flatten()[: sent.numel()].view_as(sent)

    def _adapt(self, position: int) -> None:
        parameter = self.parameters[position]
        state, grad = self.optimizer.state[parameter], parameter.grad
        if "exp_avg" not in state or grad is None or not self.method.bypass:
            return
        beta1, beta2 = self.optimizer.param_groups[0]["betas"]
        torch.mul(grad, 1 - beta1 ** (self.count - 1), out=state["exp_avg"])
        if self.method.gaps:
            gap = self.count - self.last[position]
            share = (1 - beta2**gap) / gap - (1 - beta2)
            state["exp_avg_sq"].add_(share * grad.square() / beta2)
            self.last[position] = torch.where(grad != 0, float(self.count), self.last[position])


def _any_in(parts: Sequence[str], name: str) -> bool:
    return any(part in name for part in parts)


def _largest(score: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    chosen[score.flatten().topk(count, sorted=False).indices] = True
    return chosen.view_as(score)


def payload_bytes(numels: Sequence[int], density: float, dtype: torch.dtype) -> int:
    """Returns the bytes of a rank's payload for parameters of ``numels`` elements, as "gather" lays it out."""
    offsets = [sum(numels[:position]) for position in range(len(numels))]
    segments = tuple(zip(offsets, numels, strict=True))
    block = choose_block(density, max(numels))
    return GradientLayout(segments, block, 1, -1, min(1.0, density * CAPACITY), dtype).payload_bytes


def density_of_int8(numels: Sequence[int], density: float) -> float:
    """Returns the density at which int8 values take as many bytes as bfloat16 values do at ``density``."""
    allowed, factor = payload_bytes(numels, density, torch.bfloat16), 2.0
    while payload_bytes(numels, factor * density, torch.int8) > allowed:
        factor -= 0.002
    return factor * density


def rows_for(table: Tensor, density: float) -> int:
    """Returns how many rows of ``table`` [rows, width], bfloat16 with an index each, take the bytes of its entries at ``density``."""
    row_bytes = 2 * table.shape[1] + ROW_INDEX_BYTES
    return max(1, round(payload_bytes([table.numel()], density, torch.bfloat16) / row_bytes))
