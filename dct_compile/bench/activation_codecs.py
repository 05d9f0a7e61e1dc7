"""Codecs of activations for ``dct bench accuracy``: what a receiver gets, and what its gradient becomes on the way back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.schemes.quantized import Coding
from dct_compile.triton_kernels.layout import RowLayout, quantized_row_bytes, row_bytes

dct = torch.ops.dct
Way = Callable[[Tensor], Tensor]


def _dense(x: Tensor) -> tuple[Tensor, Way]:
    return x, lambda g: g


def _bfloat16(x: Tensor) -> tuple[Tensor, Way]:
    return x.bfloat16().float(), lambda g: g.bfloat16().float()


def _threshold(density: float) -> Callable[[Tensor], tuple[Tensor, Way]]:
    def code(x: Tensor) -> tuple[Tensor, Way]:
        layout = RowLayout(tuple(x.shape[1:]), round(density * x.shape[-1]), torch.bfloat16)
        y = dct.unpack_rows(dct.pack_rows(x, layout, "exact", density, 0.0, site="", sends=""), layout, 1, x.dtype, site="", receives="")
        mask = y != 0  # not y itself, whose node would then hold it for ever
        return y, lambda g: torch.where(mask, g.bfloat16().float(), 0)

    return code


def _integers(bits: int) -> Callable[[Tensor], tuple[Tensor, Way]]:
    def one_way(x: Tensor) -> Tensor:
        coding = Coding(bits, x.shape[-1])
        codes = coding.encode(x.reshape(-1, coding.block), 0)
        return coding.decode(codes, x.dtype).view(x.shape)

    return lambda x: (one_way(x), one_way)


def _random_k(density: float) -> Callable[[Tensor], tuple[Tensor, Way]]:
    def code(x: Tensor) -> tuple[Tensor, Way]:
        mask = torch.rand(x.shape) < density
        return x * mask, lambda g: g * mask

    return code


def _low_rank(parts: int) -> Callable[[Tensor], tuple[Tensor, Way]]:
    """Projects the rows of a batch on width / ``parts`` directions: one step of the subspace iteration from random ones."""

    def one_way(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        start = rows @ torch.randn(rows.shape[1], max(1, rows.shape[1] // parts))
        left = torch.linalg.qr(start)[0]
        projected: Tensor = left @ (left.T @ rows)
        return projected.view(x.shape)

    return lambda x: (one_way(x), one_way)


@dataclass(frozen=True)
class Codec:
    """A codec. ``code`` returns what arrives, and what happens to the gradient. ``ratio`` of bytes at a width: float32 to the wire."""

    code: Callable[[Tensor], tuple[Tensor, Way]]
    ratio: Callable[[int], float]
    masks: bool = False


CODECS = {
    "dense": Codec(_dense, lambda width: 1.0),
    "bfloat16": Codec(_bfloat16, lambda width: 2.0),
    "int8": Codec(_integers(8), lambda width: 4 * width / quantized_row_bytes(width, 8)),
    "int4": Codec(_integers(4), lambda width: 4 * width / quantized_row_bytes(width, 4)),
    "threshold 5 %": Codec(_threshold(0.05), lambda width: 4 * width / row_bytes(width, round(0.05 * width), torch.bfloat16), True),
    "threshold 25 %": Codec(_threshold(0.25), lambda width: 4 * width / row_bytes(width, round(0.25 * width), torch.bfloat16), True),
    "random-k 25 %": Codec(_random_k(0.25), lambda width: 4.0, True),
    "low rank, a quarter": Codec(_low_rank(4), lambda width: 4.0),
}
"""By name. The bytes of "low rank" are those of a batch of many more rows than columns."""


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codec: Codec, forward: bool, backward: bool) -> Tensor:
        y, ctx.back = codec.code(x) if forward else (x.view_as(x), None)
        if not forward and backward:
            ctx.back = (lambda g: g) if codec.masks else (lambda g: codec.code(g)[0])
        elif not backward and not codec.masks:
            ctx.back = lambda g: g
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.back(grads[0].contiguous()), None, None, None


def coded(x: Tensor, codec: Codec, forward: bool = True, backward: bool = True) -> Tensor:
    """Returns ``x`` as it arrives at the other side, and sends its gradient back in the same way.

    Args:
        x: float32 [..., width].
        codec: The codec.
        forward: Whether the values travel. A gradient that travels alone stays dense where a codec has no mask for it.
        backward: Whether the gradient travels; if not, the mask is applied where it is.
    """
    sent: Tensor = _Coded.apply(x.contiguous(), codec, forward, backward)  # type: ignore[no-untyped-call]
    return sent
