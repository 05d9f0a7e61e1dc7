"""The coding that "quantized_rows" and "quantized_sum" share: rows, or blocks of wide rows, as integer codes with a scale each."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.config import DCTConfig
from dct_compile.exchange import BACKWARD_OF, EMBEDDING, Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.codecs import BITS, codec_of
from dct_compile.schemes.offer import RowOffer
from dct_compile.schemes.rows import refuse_rows
from dct_compile.traffic import Traffic
from dct_compile.triton_kernels.layout import quantized_row_bytes

dct = torch.ops.dct
WIDEST = 16384
"""Elements of the widest row that has one scale, and that a kernel reads at once. A wider one is cut into equal blocks."""
NARROWEST = 8
"""Elements of the narrowest activation that is quantised. Fewer numbers are statistics, as the sums of a softmax, and stay exact."""


@dataclass(frozen=True)
class Coding:
    """Codes of ``bits`` bits, with a scale for each ``block`` of elements."""

    bits: int
    block: int

    @property
    def block_bytes(self) -> int:
        """Bytes of an encoded block."""
        return quantized_row_bytes(self.block, self.bits)

    def blocks(self, exchange: Exchange) -> int:
        """Returns the number of blocks of the input of ``exchange``."""
        return exchange.rows * (exchange.width // self.block)

    def blocks_of_row(self, x: Tensor) -> int:
        """Returns the number of blocks with one leading index of ``x`` [R, ...]."""
        return prod(x.shape[1:]) // self.block

    def encode(self, blocks: Tensor, number: int, **names: str) -> Tensor:
        """Encodes ``blocks`` [B, block] as uint8 [B, block_bytes]. ``number``: of the site, so that no two sites round alike."""
        codes: Tensor = dct.quantize_rows(blocks, seed_of(blocks, number), self.bits, **names)
        return codes

    def decode(self, codes: Tensor, dtype: torch.dtype, **names: str) -> Tensor:
        """Decodes what :meth:`encode` has made, as ``dtype`` [B, block]."""
        blocks: Tensor = dct.dequantize_rows(codes, [self.block], self.bits, dtype, **names)
        return blocks


TrafficOf = Callable[[Exchange, Coding], Traffic]


@dataclass(frozen=True, kw_only=True)
class QuantizedOffer(RowOffer):
    """An offer of integer codes. ``coding``: of both ways."""

    coding: Coding


OfferT = TypeVar("OfferT", bound=QuantizedOffer)


def coding_of(exchange: Exchange, config: DCTConfig) -> Coding | str | None:
    """Returns the coding of an exchange that is to be quantised, or the reason why it cannot be; ``None`` for one of another codec."""
    bits = BITS.get(codec_of(exchange, config) or "")
    if bits is None:
        return None
    if (reason := refuse_rows(exchange)) is not None:
        return reason
    width = exchange.width
    if exchange.kind not in (EMBEDDING, BACKWARD_OF[EMBEDDING]) and width < NARROWEST:
        return Reason.NARROW_ROW.format(width=width)
    block = largest_part(width, WIDEST)
    return Coding(bits, block) if block <= WIDEST else Reason.WIDE_ROW.format(width=width, limit=WIDEST)


def offered(kind: type[OfferT], scheme: str, reason: Reason, exchange: Exchange, coding: Coding, traffic: TrafficOf) -> OfferT:
    """Makes the offer of a scheme for an exchange and its backward, which are encoded alike.

    Args:
        kind: The class of the offer.
        scheme: The scheme's name.
        reason: The report's words.
        exchange: The exchange.
        coding: The coding of both ways.
        traffic: ``traffic(exchange, coding)`` returns the work of one way.
    """
    said, back = reason.format(bits=coding.bits), exchange.backward
    return kind(
        exchange=exchange,
        scheme=scheme,
        reason=said,
        too_large=Reason.QUANTIZED_TOO_LARGE.format(bits=coding.bits, width=exchange.width),
        traffic=traffic(exchange, coding),
        digest=f"{coding.bits} bits",
        backward_traffic=traffic(back, coding) if back is not None else None,
        backward_reason=said,
        coding=coding,
    )


def largest_part(width: int, limit: int) -> int:
    """Returns the largest divisor of ``width`` up to ``limit``; ``width`` itself where that is less than :data:`NARROWEST`."""
    part = next(width // count for count in range(1, width + 1) if width % count == 0 and width // count <= limit)
    return part if part >= min(NARROWEST, width) else width


def seed_of(x: Tensor, number: int) -> Tensor:
    """Makes a seed of the data's own bits: it changes with every batch, and a resumed run repeats it. The same weights decode alike."""
    bits = x.view(torch.int32 if x.itemsize == 4 else torch.int16)
    return (bits.sum() + number).reshape([1])
