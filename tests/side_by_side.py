"""Averages gradient buffers of several ranks in one process: the function of a scheme, traced once and run on all of them in lockstep."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import GRADIENT, Exchange, Parameter, segments_of
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.decision import Decision
from dct_compile.passes.plan import decide
from dct_compile.passes.splice import trace
from dct_compile.schemes import GradientOffer
from dct_compile.state.bucket import BucketState
from tests.lockstep import run_in_lockstep

Shapes = Mapping[str, tuple[int, ...]]


def decide_shapes(
    shapes: Shapes, ranks: int = 2, dtype: torch.dtype = torch.float32, op: str = "avg", unused: bool = False, **options: Any
) -> Decision:
    """The decision about a bucket of parameters of these names and ``shapes``."""
    segments = segments_of([Parameter(index, name, shape) for index, (name, shape) in enumerate(shapes.items())])
    numel = sum(segment.parameter.numel for segment in segments)
    size = numel * dtype.itemsize
    names = ", ".join(shapes)
    exchange = Exchange(
        ALL_REDUCE, GRADIENT, names, (numel,), dtype, "0", ranks, 0, size, reduce_op=op, segments=segments, may_be_unused=unused
    )
    return decide(exchange, DCTConfig(**options))


class SideBySide:
    """The reducers of all ranks for one bucket. ``states``: that of each rank."""

    def __init__(self, shapes: Shapes, ranks: int = 2, dtype: torch.dtype = torch.float32, op: str = "avg", **options: Any) -> None:
        decision = decide_shapes(shapes, ranks, dtype, op, **options)
        assert isinstance(decision.offer, GradientOffer), decision.reason
        offer = self.offer = decision.offer
        self.ranks, self.dtype, self.numel = ranks, dtype, offer.members.numel
        self.states = [BucketState([], offer.state, torch.device("cpu")) for _ in range(ranks)]
        names = list(self.states[0].tensors)
        with FakeTensorMode():
            fakes = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in self.states[0].tensors.values()]
            grad = torch.empty(self.numel, dtype=dtype)

        def reduce(grad: Tensor, *state: Tensor) -> list[Tensor]:
            return [offer.reduce(grad, dict(zip(names, state, strict=True)), Comm("0", ranks))]

        self.graph = trace(reduce, [grad, *fakes]).graph

    def step(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The result of each rank for its gradient buffer."""
        inputs = [[grad, *state.tensors.values()] for grad, state in zip(grads, self.states, strict=True)]
        return [result[0] for result in run_in_lockstep([self.graph] * self.ranks, inputs)]

    def gradients(self, step: int) -> list[Tensor]:
        """Random gradients, other ones on every rank."""
        generators = [torch.Generator().manual_seed(1000 * step + rank) for rank in range(self.ranks)]
        return [torch.randn(self.numel, generator=generator).to(self.dtype) for generator in generators]

    def compressed(self, grad: Tensor) -> Tensor:
        """The compressed parts of a buffer, end to end."""
        return torch.cat(self.offer.members.split(grad))

    def residuals(self) -> list[Tensor]:
        return [state.tensors["residual"].clone() for state in self.states]
