"""The threshold of each compressed parameter: chosen at refresh steps from the gradient plus what is still owed to it."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log

import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import GradientLayout, Selection
from dct_compile.triton_kernels.schedule import held_threshold, is_refresh_step
from dct_compile.triton_kernels.values import of_segment

SAMPLE_GROUP = 16
"""Neighbours that are sampled together: memory moves whole lines."""
FEWEST_GROUPS = 4096
"""Sampled groups of a parameter, at least; one that would have fewer is looked at as a whole."""
STRIDES = (31, 13)
"""Distances of sampled groups. Hardly any matrix has rows of so many groups, or a multiple, of which always the same would be sampled."""


@dataclass(frozen=True)
class Region:
    """The elements of one parameter that are looked at, every ``stride``-th group, and the rank of the threshold among their magnitudes.

    ``target``: how many of all elements are to be kept. ``mean_factor``: the threshold over the mean magnitude, for "laplace".
    """

    segment: int
    grad_offset: int
    state_offset: int
    numel: int
    stride: int
    rank: int
    target: int
    mean_factor: float


def sample_stride(numel: int) -> int:
    """Returns the distance of sampled groups, the largest that leaves enough of them."""
    return next((stride for stride in STRIDES if numel >= stride * SAMPLE_GROUP * FEWEST_GROUPS), 1)


def sample_numel(numel: int, stride: int) -> int:
    """How many elements every ``stride``-th group of ``numel`` has."""
    groups, rest = divmod(numel, SAMPLE_GROUP * stride)
    return groups * SAMPLE_GROUP + min(rest, SAMPLE_GROUP)


def sample(x: Tensor, stride: int) -> Tensor:
    """Returns every ``stride``-th group of ``x`` [n]; the last may be shorter."""
    return x if stride == 1 else torch.cat([part[:SAMPLE_GROUP] for part in x.split(SAMPLE_GROUP * stride)])


@lru_cache(maxsize=4096)
def regions(layout: GradientLayout, selection: Selection) -> tuple[Region, ...]:
    """Returns the region of each parameter that has elements here: of the whole segment (``chunk == -1``) or of the owner's piece of it."""
    found: list[Region] = []
    state_offset = 0
    if layout.chunk < 0:
        parameters = [(segment, offset, numel) for segment, (offset, numel) in enumerate(layout.segments)]
    else:
        parameters = [(piece.segment, piece.grad_offset, piece.numel) for piece in layout.pieces]
    for segment, grad_offset, numel in parameters:
        if numel:
            density = of_segment(selection.density, segment)
            stride = sample_stride(numel) if selection.method == "sampled" else 1
            sampled = sample_numel(numel, stride)
            rank, target = (min(max(ceil(density * count), 1), count) for count in (sampled, numel))
            found.append(Region(segment, grad_offset, state_offset, numel, stride, rank, target, -log(density)))
        state_offset += numel
    return tuple(found)


def constant_threshold(selection: Selection) -> float | None:
    """Returns the threshold that needs no look at the gradient: 0 if everything is kept, the given one for "fixed", else None."""
    if not isinstance(selection.density, tuple) and selection.density >= 1:
        return 0.0
    return selection.fixed if selection.method == "fixed" else None


@torch.no_grad()
def select_threshold_reference(
    grad: Tensor,
    residual: Tensor,
    threshold: Tensor,
    counters: Tensor,
    layout: GradientLayout,
    selection: Selection,
    error_feedback: bool,
) -> None:
    """Choose the thresholds that are due at this step ([Gupta21] Alg. 1: every ``refresh_interval`` steps).

    ``grad`` [numel] float32, bfloat16 or float16; ``residual`` [state_numel] float32; ``threshold`` [S] float32, mutated; ``counters``
    [S, COUNTERS] int64 (see ``layout.COUNTERS``), read. With W = grad + residual (grad alone without error feedback), over each parameter:

    - "exact": the ceil(density * n)-th largest abs(W);
    - "sampled": the same over every ``sample_stride(n)``-th group of 16 neighbours;
    - "laplace": -mean(abs(W)) * ln(density), the quantile of a zero-mean Laplace distribution with that mean;
    - "fixed": ``fixed``, at every step.

    A density of 1 or more gives 0 at every step. Where one of the elements that are looked at is not finite the threshold stays. At other
    steps ``hold`` lets it follow the number of candidates of the step before, see `schedule.held_threshold`.
    """
    constant = constant_threshold(selection)
    for region in regions(layout, selection):
        step, _, _, overflow, kept = counters[region.segment].tolist()
        overflowed = overflow > (kept if selection.hold else 0)
        if constant is not None:
            threshold.data[region.segment] = constant
        elif is_refresh_step(step, selection.refresh_interval, selection.refresh_warmup, overflowed):
            w = grad[region.grad_offset : region.grad_offset + region.numel].float()
            if error_feedback:
                w = w + residual[region.state_offset : region.state_offset + region.numel]
            magnitudes = sample(w, region.stride).abs()
            if not bool(magnitudes.isfinite().all()):
                continue
            if selection.method == "laplace":
                threshold.data[region.segment] = magnitudes.double().mean() * region.mean_factor
            else:
                threshold.data[region.segment] = magnitudes.topk(region.rank, sorted=False).values.min()
        elif selection.hold and kept:
            own = float(threshold[region.segment])
            threshold.data[region.segment] = held_threshold(own, kept + overflow, region.target, region.numel)
