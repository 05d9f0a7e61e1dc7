"""PowerSGD: low-rank factors of a gradient, with error feedback and warm start (Vogels et al., NeurIPS 2019, arXiv 1905.13727, Alg. 1).

::

    mean = all_reduce(grad, "avg")       total  = grad + residual                          [rows, columns], for each parameter
                                         left   = all_reduce(total @ orthogonal(right), "avg")         [rows, rank]
                                  ==>    left   = orthogonal(left)
                                         right! = all_reduce(total.T @ left, "avg")                    [columns, rank]
                                         mean   = left @ right.T
                                         residual! = total - mean

A parameter of several dimensions counts as a matrix with its first dimension as rows. Vectors stay dense, and so do parameters whose
factors are at least half as large as they are. The factors travel as float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm, Steps
from dct_compile.config import DCTConfig
from dct_compile.exchange import GRADIENT, Exchange, Parameter
from dct_compile.reasons import Reason
from dct_compile.schemes.members import divide, said_too_large
from dct_compile.schemes.offer import Declined, GradientOffer
from dct_compile.state.spec import StateSpec, StateTensor, counters_of, end_to_end, residual_of
from dct_compile.triton_kernels.layout import COUNTERS

dct = torch.ops.dct


@dataclass(frozen=True, kw_only=True)
class PowerSGD(GradientOffer):
    """An offer of the scheme "powersgd": factors of ``rank`` columns, for matrices of ``shapes``."""

    rank: int
    shapes: tuple[tuple[int, int], ...]
    error_feedback: bool

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        rest = self.members.start_rest(grad, comm, self.exchange)
        residual, counters = state["residual"], state["counters"]
        total = torch.cat(self.members.split(grad)).float() + (residual if self.error_feedback else 0.0)
        matrices = [part.view(shape) for part, shape in zip(total.split(list(self.members.numels)), self.shapes, strict=True)]
        rights = self._factors(state["right_factor"], 1)
        lefts = _flat([_product(matrix, _orthogonal(right)) for matrix, right in zip(matrices, rights, strict=True)])
        lefts = yield comm.all_reduce(lefts, "avg")
        orthogonal = [_orthogonal(left) for left in self._factors(lefts, 0)]
        flat = yield comm.all_reduce(_flat([_product(m.T, left) for m, left in zip(matrices, orthogonal, strict=True)]), "avg")
        copies = self.exchange.ranks // self.exchange.divisor  # a sum over the ranks is that many means
        rights = self._factors(flat * copies, 1)
        reduced = _flat([_product(left, right.T) for left, right in zip(orthogonal, rights, strict=True)]).to(grad.dtype)
        # A value that is not finite is in the factors of all ranks: then no rank changes its state, as if the step had not been.
        finite = flat.isfinite().all()
        if self.error_feedback:
            dct.store(residual, torch.where(finite, total.sub(reduced, alpha=1 / copies), residual))
        dct.store(state["right_factor"], torch.where(finite, flat, state["right_factor"]))
        dct.store(counters, torch.nn.functional.pad(counters[:, :1] + finite, (0, COUNTERS - 1)))
        rest = yield from self.members.end_rest(rest)
        return self.members.join(list(reduced.split(list(self.members.numels))), rest, grad if in_place else None)

    def _factors(self, flat: Tensor, side: int) -> list[Tensor]:
        """Returns the factors of all matrices, which lie end to end; ``side``: 0 for those with the rows, 1 for those with the columns."""
        sizes = [shape[side] for shape in self.shapes]
        return [part.view(size, self.rank) for part, size in zip(flat.split([size * self.rank for size in sizes]), sizes, strict=True)]


def _flat(matrices: list[Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns the product in the dtype of the factors, also where a hook of the backward runs under autocast."""
    with torch._C._DisableAutocast():
        return left @ right


def _orthogonal(matrix: Tensor) -> Tensor:
    """Returns an orthonormal basis of the columns.

    A column of zeros counts as one without zeros: from a basis vector such as [1, 0, ...], a factor would not recover if the gradient was
    zero for a step and is zero in its first row and column from then on.
    """
    rows, columns = (torch.arange(1, size + 1, device=matrix.device) for size in matrix.shape)
    basis: Tensor = torch.linalg.qr(torch.where(matrix.any(0), matrix, torch.outer(rows, columns).cos()))[0]
    return basis


def offer(exchange: Exchange, config: DCTConfig) -> PowerSGD | Declined | None:
    """Offers low-rank factors."""
    if exchange.kind != GRADIENT or config.gradient_scheme != "powersgd":
        return None
    if exchange.may_be_unused:
        return Declined(Reason.MAY_BE_UNUSED.format(scheme="powersgd"))
    if config.dp_density == 1:
        return Declined(str(Reason.DP_DENSITY_ONE))
    members = divide(exchange, config, lambda parameter: _refuse(parameter, config.rank))
    if isinstance(members, str):
        return Declined(members)
    shapes = tuple(_matrix(segment.parameter) for segment in members.compressed)
    columns = [config.rank * shape[1] for shape in shapes]
    sizes = tuple(config.rank * sum(shape) for shape in shapes)
    left_bytes, right_bytes = 4 * config.rank * sum(rows for rows, _ in shapes), 4 * sum(columns)
    factors = exchange.collective.sent(left_bytes, exchange.ranks) + exchange.collective.sent(right_bytes, exchange.ranks)
    traffic = factors.passing_over(40 * sum(members.numels)) + members.rest_traffic(exchange)
    template = Reason.LOW_RANK_BUT if members.rest else Reason.LOW_RANK
    right = StateTensor("right_factor", (sum(columns),), torch.float32, end_to_end(columns), fill=None)
    return PowerSGD(
        exchange=exchange,
        scheme="powersgd",
        reason=template.format(rank=config.rank, names=members.rest_names),
        too_large=said_too_large("powersgd", exchange, traffic),
        traffic=traffic,
        digest=f"rank {config.rank} of {len(shapes)} matrices",
        members=members,
        state=StateSpec(
            members.numels,
            (residual_of(end_to_end(members.numels)), right, counters_of(len(shapes))),
            sent=sizes,
            waits=False,
        ),
        rank=config.rank,
        shapes=shapes,
        error_feedback=config.error_feedback,
    )


def _matrix(parameter: Parameter) -> tuple[int, int]:
    return parameter.shape[0], parameter.numel // max(1, parameter.shape[0])


def _refuse(parameter: Parameter, rank: int) -> str | None:
    if len(parameter.shape) < 2:
        return Reason.NO_MATRIX
    rows, columns = _matrix(parameter)
    if 2 * rank * (rows + columns) >= rows * columns:
        return Reason.HIGH_RANK.format(rank=rank, rows=rows, columns=columns)
    return None
