"""Activations as bfloat16 on the wire: half of the bytes of float32, and nothing but a rounding is lost.

A sum is taken of the rows of all ranks, in float32, and rounded once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.codecs import BFLOAT16, codec_of
from dct_compile.schemes.offer import Declined, RowOffer
from dct_compile.schemes.rows import addends, averaged, carry, refuse_rows
from dct_compile.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class CastRows(RowOffer):
    """An offer of the scheme "cast_rows"."""

    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _exchange(x, self.exchange, comm), ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        assert self.exchange.backward is not None
        return _exchange(dy, self.exchange.backward, comm)

    def encode(self, x: Tensor) -> Tensor:
        """Returns ``x`` as one message, bfloat16."""
        return x.bfloat16()

    def payload_for(self, x: Tensor) -> Tensor:
        """Returns an empty message for a tensor like ``x``."""
        return torch.empty_like(x, dtype=torch.bfloat16)

    def decode(self, payload: Tensor, x: Tensor) -> Tensor:
        """Returns the rows of a message, with the dtype of ``x``."""
        return payload.to(x.dtype)


def _exchange(x: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
    received = carry(x.bfloat16(), exchange, comm)
    if addends(exchange) == 1:
        return received.to(x.dtype)
    rows = received.float().reshape(addends(exchange), -1, *x.shape[1:])
    return averaged(rows.sum(0), exchange).to(x.dtype)


def offer(exchange: Exchange, config: DCTConfig) -> CastRows | Declined | None:
    """Offers bfloat16 for rows that are to keep what a model returns."""
    if codec_of(exchange, config) != BFLOAT16:
        return None
    if (reason := refuse_rows(exchange)) is not None:
        return Declined(reason)
    return CastRows(
        exchange=exchange,
        scheme="cast_rows",
        reason=str(Reason.CAST),
        too_large=Reason.CAST_TOO_LARGE.format(dtype=str(exchange.dtype).removeprefix("torch.")),
        traffic=_traffic(exchange),
        digest=BFLOAT16,
        backward_traffic=_traffic(exchange.backward) if exchange.backward is not None else None,
        backward_reason=str(Reason.CAST),
    )


def _traffic(exchange: Exchange) -> Traffic:
    payload = exchange.rows * exchange.width * torch.bfloat16.itemsize
    return exchange.sent_encoded(payload).passing_over(2 * exchange.input_bytes + (1 + addends(exchange)) * payload)
