"""Quantised rows with stochastic rounding, for embeddings: integer codes and one scale per row, forward and backward.

::

    y = all_to_all_single(x)             codes    = dct.quantize_rows(x, seed)
                                  ==>    received = all_to_all_single(codes)
                                         y        = dct.dequantize_rows(received)

The backward is encoded by itself, in the same way.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import EMBEDDING, Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.offer import Declined, RowOffer
from dct_compile.schemes.rows import addends, averaged, carry, refuse_rows
from dct_compile.traffic import Traffic
from dct_compile.triton_kernels.layout import quantized_row_bytes

dct = torch.ops.dct
BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class QuantizedRows(RowOffer):
    """An offer of the scheme "quantized_rows": codes of ``bits`` bits."""

    bits: int

    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._exchange(x, self.exchange, comm), ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        assert self.exchange.backward is not None
        return self._exchange(dy, self.exchange.backward, comm)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the codes of ``x`` [R, ...] as one message, uint8 [R, bytes]."""
        payload: Tensor = dct.quantize_rows(x.contiguous(), _seed(x, self.exchange.number), self.bits, site=self.exchange.label)
        return payload

    def payload_for(self, x: Tensor) -> Tensor:
        """Returns an empty message for the codes of a tensor like ``x`` [R, ...]."""
        row_bytes = prod(x.shape[1:-1]) * quantized_row_bytes(x.shape[-1], self.bits)
        return torch.empty([x.shape[0], row_bytes], dtype=torch.uint8, device=x.device)

    def decode(self, payload: Tensor, x: Tensor) -> Tensor:
        """Returns the rows of a message, with the shape and dtype of ``x``."""
        y: Tensor = dct.dequantize_rows(payload, list(x.shape[1:]), self.bits, x.dtype, site=self.exchange.label)
        return y

    def _exchange(self, x: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
        site, carrier, row_shape = exchange.label, exchange.collective.carrier, [int(size) for size in x.shape[1:]]
        codes = dct.quantize_rows(x, _seed(x, exchange.number), self.bits, site=site, sends=carrier)
        received = carry(codes, exchange, comm)
        y = dct.dequantize_rows(received, row_shape, self.bits, x.dtype, site=site, receives=carrier)
        if addends(exchange) > 1:
            y = y.reshape([addends(exchange), -1, *row_shape]).sum(0)
        return averaged(y, exchange)


def _seed(x: Tensor, number: int) -> Tensor:
    """Makes a seed of the data's own bits: it changes with every batch, and a resumed run repeats it."""
    bits = x.view(torch.int32 if x.itemsize == 4 else torch.int16)
    return (bits.sum() + number).reshape([1])


def offer(exchange: Exchange, config: DCTConfig) -> QuantizedRows | Declined | None:
    """Offers integer codes for the rows of an embedding exchange."""
    if exchange.kind != EMBEDDING or config.embedding_codec == "threshold":
        return None
    if (reason := refuse_rows(exchange)) is not None:
        return Declined(reason)
    if config.embedding_codec == "dense":
        return Declined(Reason.CODEC_DENSE)
    bits = BITS[config.embedding_codec]
    reason = Reason.QUANTIZED.format(bits=bits)
    return QuantizedRows(
        exchange=exchange,
        scheme="quantized_rows",
        reason=reason,
        too_large=Reason.QUANTIZED_TOO_LARGE.format(bits=bits, width=exchange.width),
        traffic=_traffic(exchange, bits),
        digest=f"{bits} bits",
        backward_traffic=_traffic(exchange.backward, bits) if exchange.backward is not None else None,
        backward_reason=reason,
        bits=bits,
    )


def _traffic(exchange: Exchange, bits: int) -> Traffic:
    assert exchange.dtype is not None
    payload = exchange.rows * quantized_row_bytes(exchange.width, bits)
    size = exchange.rows * exchange.width * exchange.dtype.itemsize
    return exchange.sent_encoded(payload).passing_over(2 * size + (1 + addends(exchange)) * payload)
