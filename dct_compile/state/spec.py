"""Describes the state that a scheme keeps for a bucket of parameters: plain values, no tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from dct_compile.element_order import ElementOrder
from dct_compile.triton_kernels.layout import COUNTERS

Part = int | tuple[int, int]
"""The part of a tensor that belongs to one parameter: a row, or the rows from a first one up to a last one, excluded."""


LOCAL = "local"
"""The name of the sum of a rank's own gradients since the audit has looked, kept with option ``audit``."""

LATE = "late"
"""The name of the mean that joins the gradient of the next step, kept with option ``arrival``."""


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a bucket's state.

    ``parts``: for each parameter of the bucket, its part of the first dimension. ``fill``: the initial value; ``None`` for normally
    distributed numbers that are the same on all ranks. ``stage``: "" for a rank's own gradient, "owner" for the sum that it owns.

    Five names have a meaning beyond their scheme. "residual" (float32 [numel]) was not sent: it is handed on when another scheme takes
    over. "counters" (int64 [parameters, COUNTERS], see ``layout.COUNTERS``) and "threshold" (float32 [parameters]) are read by the monitor.
    "local" (float32 [numel]) is read by the audit. "late" (float32 [numel], row-major) is a mean that no gradient has joined yet: it is the
    same on all ranks, and is added to the residual of each where nothing hands it out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]
    fill: float | None = 0.0
    stage: str = ""

    @property
    def input_name(self) -> str:
        """The name of the graph input, and the key in the mapping that a scheme is given."""
        return f"{self.stage}_{self.name}" if self.stage else self.name


@dataclass(frozen=True)
class StateSpec:
    """The state of one bucket: for parameters of ``numels`` elements, these ``tensors``.

    ``owner_share``: block, chunks, chunk and unit of the share that this rank owns, where the state has an owner's stage. ``sent``:
    elements that a step sends for each parameter, where that number is fixed; the counters tell it otherwise. ``orders``: the order of the
    elements of each residual, for a scheme that works on the buffer as it is; empty where all residuals are row-major. ``waits``: whether
    an element is sent once in many steps, with all that has added up. ``densities``: of each parameter, for its optimizer; empty for
    a scheme without. A state of other densities is the same state. ``counted``: elements of each parameter that the counters of this rank
    speak of; empty where they are all.
    """

    numels: tuple[int, ...]
    tensors: tuple[StateTensor, ...]
    owner_share: tuple[int, int, int, int] | None = None
    sent: tuple[int, ...] | None = None
    orders: tuple[ElementOrder | None, ...] = ()
    waits: bool = True
    densities: tuple[float, ...] = field(default=(), compare=False)
    counted: tuple[int, ...] = ()


def end_to_end(numels: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns the parts of a flat tensor in which parameters of ``numels`` elements lie one behind the other."""
    ends = list(accumulate(numels))
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def residual_of(parts: tuple[tuple[int, int], ...], stage: str = "") -> StateTensor:
    """Describes a residual whose elements ``parts`` belong to the parameters."""
    return StateTensor("residual", (max((end for _, end in parts), default=0),), torch.float32, parts, stage=stage)


def counters_of(parameters: int, stage: str = "") -> StateTensor:
    """Describes the counters of ``parameters`` parameters."""
    return StateTensor("counters", (parameters, COUNTERS), torch.int64, tuple(range(parameters)), stage=stage)
