"""Lets the mean of a step join the gradient of the next one, so that its exchange may run beside that step (``arrival="late"``).

::

    step k     mean k starts                    the gradient becomes mean k-1
    step k+1   mean k has arrived, mean k+1 starts    the gradient becomes mean k

For an element that waits a hundred steps it is one more. Those that are sent in nearly every step feel it, as all do without compression:
a training at a high learning rate loses accuracy. Synchronisation beside the training is the idea of
ShadowSync (Zheng et al., 2020, arXiv 2003.03477). The parameters that the scheme leaves dense have no residual, so nothing could take back
what was under way: they are averaged beside it, in an all_reduce of their own, and arrive at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm, Steps
from dct_compile.exchange import Segment
from dct_compile.schemes.offer import GradientOffer
from dct_compile.state.spec import LATE, StateTensor, end_to_end
from dct_compile.traffic import NOTHING


@dataclass(frozen=True, kw_only=True)
class Late(GradientOffer):
    """``inner``, whose result comes one call later; the first call returns zeros.

    ``inner`` is an offer for the compressed parameters alone, end to end.
    """

    inner: GradientOffer

    @classmethod
    def of(cls, offer: GradientOffer, inner: GradientOffer) -> "Late":
        """Returns ``offer`` as one that arrives late. ``inner``: the same scheme's offer for the parameters that ``offer`` compresses."""
        exchange, numels = offer.exchange, inner.members.numels
        assert exchange.dtype is not None
        tensor = StateTensor(LATE, (sum(numels),), torch.float32, end_to_end(numels))
        size = offer.members.rest_numel * exchange.dtype.itemsize
        rest = exchange.collective.sent(size, exchange.ranks).passing_over(2 * size) if size else NOTHING
        values = {item.name: getattr(offer, item.name) for item in fields(GradientOffer)}
        changed = {
            "traffic": inner.traffic + rest,
            "digest": f"{inner.digest}, late",
            "state": replace(inner.state, tensors=(*inner.state.tensors, tensor)),
        }
        return cls(**{**values, **changed}, inner=inner)

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        rest = self.rest(grad)
        started = None if rest is None else comm.all_reduce(rest, self.exchange.reduce_op)
        arrived = self.arrived(state, grad.dtype)
        self.send(self.compressed(grad), state, comm, in_place=in_place)
        mean = None if started is None else (yield started)
        return self.join(arrived, mean, grad if in_place else None)

    def arrived(self, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Returns a copy of the mean of the call before, of the compressed parameters in row-major order."""
        return state[LATE].to(dtype, copy=True)

    def compressed(self, grad: Tensor) -> Tensor:
        """Returns a copy of the parts of the buffer ``grad`` that are compressed, as they lie in it."""
        return _parts(grad, self.members.compressed)

    def rest(self, grad: Tensor) -> Tensor | None:
        """Returns a copy of the parts of the buffer ``grad`` that stay dense; ``None`` where there are none."""
        return _parts(grad, self.members.rest) if self.members.rest else None

    def send(self, compressed: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> None:
        """Exchanges the result of :meth:`compressed`, and keeps the mean in the state. ``in_place``: whether the first is overwritten."""
        mean = self.inner.reduce(compressed, state, comm, in_place=in_place)
        torch.ops.dct.store(state[LATE], torch.cat(self.inner.members.split(mean)).float())

    def join(self, arrived: Tensor, rest: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Builds the buffer from the mean of the call before and the mean of the rest, in the memory of ``out`` if it is given."""
        return self.members.join(list(arrived.split(list(self.members.numels))), rest, out)


def _parts(grad: Tensor, segments: Sequence[Segment]) -> Tensor:
    return torch.cat([grad[segment.offset : segment.offset + segment.parameter.numel] for segment in segments])
