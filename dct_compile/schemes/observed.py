"""Notes a rank's own gradient beside whatever a scheme does, for ``dct_compile.audit``: a graph that averages it shows only the mean."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm, Steps
from dct_compile.schemes.offer import GradientOffer
from dct_compile.state.spec import LOCAL, StateTensor, end_to_end


@dataclass(frozen=True, kw_only=True)
class Observed(GradientOffer):
    """``inner``, which also notes the gradient that it is given."""

    inner: GradientOffer

    @classmethod
    def of(cls, offer: GradientOffer) -> "Observed":
        parts = end_to_end(offer.members.numels)
        tensor = StateTensor(LOCAL, (sum(offer.members.numels),), torch.float32, parts)
        values = {item.name: getattr(offer, item.name) for item in fields(GradientOffer)}
        return cls(**{**values, "state": replace(offer.state, tensors=(*offer.state.tensors, tensor))}, inner=offer)

    def steps(self, grad: Tensor, state: Mapping[str, Tensor], comm: Comm, *, in_place: bool = False) -> Steps:
        torch.ops.dct.store(state[LOCAL], state[LOCAL] + torch.cat(self.members.split(grad)).float())
        return (yield from self.inner.steps(grad, state, comm, in_place=in_place))
