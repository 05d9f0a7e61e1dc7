"""Random-k with a shared seed: all ranks draw the same elements, so that no index travels and the values are added on their way.

::

    mean = all_reduce(grad, "avg")       total  = grad + residual
                                         drawn  = one element of each stretch, the same on all ranks
                                  ==>    values = all_reduce(total[drawn], "avg")                     float32
                                         residual! = total, with zeros at the drawn elements
                                         mean   = zeros, with values at the drawn elements

A parameter of n elements is cut into k stretches. A hash of a stretch's number and of the draws so far chooses one element of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm, Steps
from dct_compile.config import DCTConfig
from dct_compile.exchange import GRADIENT, Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.members import said_too_large
from dct_compile.schemes.offer import Declined, GradientOffer
from dct_compile.schemes.threshold import divide_by_density, said
from dct_compile.state.spec import StateSpec, StateTensor, counters_of, end_to_end, residual_of
from dct_compile.triton_kernels.layout import COUNTERS

dct = torch.ops.dct


@dataclass(frozen=True, kw_only=True)
class RandomK(GradientOffer):
    """An offer of the scheme "random_k"; ``drawn``: how many elements of each compressed parameter are sent."""

    drawn: tuple[int, ...]
    error_feedback: bool

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        rest = self.members.start_rest(grad, comm, self.exchange)
        draws, residual, counters = state["draws"], state["residual"], state["counters"]
        total = torch.cat(self.members.split(grad)).float() + (residual if self.error_feedback else 0.0)
        index = draw(draws.max(), list(zip(self.members.numels, self.drawn, strict=True)))
        # A rank with a value that is not finite says so with all of its values: a gradient scaler must see it on every rank.
        sent = torch.where(total.isfinite().all(), total[index], float("nan"))
        values = yield comm.all_reduce(sent, self.exchange.reduce_op)
        finite = values.isfinite().all()
        if self.error_feedback:
            left = total.index_fill(0, index, 0.0)
            dct.store(residual, torch.where(finite, left, residual))
        dct.store(draws, draws + finite)
        dct.store(counters, torch.nn.functional.pad(counters[:, :1] + finite, (0, COUNTERS - 1)))
        mean = torch.zeros_like(total).index_copy(0, index, values).to(grad.dtype)
        rest = yield from self.members.end_rest(rest)
        return self.members.join(list(mean.split(list(self.members.numels))), rest, grad if in_place else None)


def draw(step: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Returns the elements that all ranks draw at ``step`` from parameters that lie end to end: int64, ascending.

    A parameter draws the same elements in every bucket, so that a run goes on alike when DDP forms other buckets. The stretches of a
    parameter are as long as each other, or one element longer. All products stay below 2^63 for sizes and steps up to 2^31.

    Args:
        step: int64 [], how often elements were drawn before.
        sizes: for each parameter, its elements and how many of them are drawn.
    """
    numbers = [torch.arange(count, device=step.device) for _, count in sizes]
    offsets = [0, *accumulate(numel for numel, _ in sizes)]
    starts = [number * numel // count + offset for number, (numel, count), offset in zip(numbers, sizes, offsets[:-1], strict=True)]
    start, number = torch.cat(starts), torch.cat(numbers)
    length = torch.nn.functional.pad(start[1:], (0, 1), value=offsets[-1]) - start
    key = (step * 0x1E3779B1 + number * 0x05EBCA77) & 0x7FFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B56C4E9)):
        key = ((key ^ (key >> shift)) * factor) & 0x7FFFFFFF
    return start + (key ^ (key >> 16)) % length


def offer(exchange: Exchange, config: DCTConfig) -> RandomK | Declined | None:
    """Offers elements that all ranks draw alike."""
    if exchange.kind != GRADIENT or config.gradient_scheme != "random_k":
        return None
    if exchange.may_be_unused:
        return Declined(Reason.MAY_BE_UNUSED.format(scheme="random_k"))
    members = divide_by_density(exchange, config)
    if isinstance(members, str):
        return Declined(members)
    numel, count = sum(members.numels), len(members.numels)
    drawn = tuple(ceil(density * own) for density, own in zip(members.densities(config), members.numels, strict=True))
    traffic = exchange.collective.sent(4 * sum(drawn), exchange.ranks).passing_over(24 * numel) + members.rest_traffic(exchange)
    # The counters may come from another scheme, where a rank counts its own steps. The number of draws is the same on all ranks.
    draws = StateTensor("draws", (count,), torch.int64, tuple(range(count)))
    return RandomK(
        exchange=exchange,
        scheme="random_k",
        reason=said("random_k", members, config),
        too_large=said_too_large("random_k", exchange, traffic),
        traffic=traffic,
        digest=f"{sum(drawn)} of {numel}",
        members=members,
        state=StateSpec(
            members.numels,
            (residual_of(end_to_end(members.numels)), draws, counters_of(count)),
            sent=drawn,
            densities=members.densities(config),
        ),
        drawn=drawn,
        error_feedback=config.error_feedback,
    )
