"""The operator by which the moments of optimizers are changed before a step: `prepare_moments`, specified by its PyTorch reference."""

from collections.abc import Sequence

from torch import Tensor

from dct_compile.ops.library import define_op
from dct_compile.triton_kernels.cpu.moments import prepare_moments_cpu
from dct_compile.triton_kernels.moments import check_prepare_moments, prepare_moments_reference
from dct_compile.triton_kernels.moments_triton import prepare_moments_triton


def _prepare_moments_fake(
    scalars: Tensor,
    shares: Tensor | None,
    grads: Sequence[Tensor],
    parameters: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    last: Sequence[Tensor],
) -> None:
    return None


prepare_moments = define_op(
    "prepare_moments(Tensor scalars, Tensor? shares, Tensor[] grads, Tensor[] parameters,"
    " Tensor(a!)[] first, Tensor(b!)[] second, Tensor(c!)[] last) -> ()",
    check=check_prepare_moments,
    fake=_prepare_moments_fake,
    reference=prepare_moments_reference,
    cpu=prepare_moments_cpu,
    triton=prepare_moments_triton,
)
