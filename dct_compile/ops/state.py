"""The operator by which schemes in plain PyTorch update their state: `store`."""

from typing import Any

import torch
from torch import Tensor
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import lowerings, register_lowering

from dct_compile.ops.library import define_op
from dct_compile.triton_kernels.store import check_store, store_reference


def _store_fake(state: Tensor, value: Tensor) -> None:
    return None


store = define_op("store(Tensor(a!) state, Tensor value) -> ()", check=check_store, fake=_store_fake, reference=store_reference)


@register_lowering(store, type_promotion_kind=None)
def _lower_store(state: TensorBox, value: TensorBox, **names: Any) -> None:
    """Lets Inductor generate the copy, fused with what computes ``value``.

    For an operator that it calls, Inductor computes anew, from the new state, those values of the old state that it has not yet written to
    memory. For a copy it writes them first.
    """
    lowerings[torch.ops.aten.copy_.default](state, value)
