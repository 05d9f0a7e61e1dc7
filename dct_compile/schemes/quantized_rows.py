"""Quantised rows with stochastic rounding: integer codes and one scale per row, forward and backward.

::

    y = all_to_all_single(x)             codes    = dct.quantize_rows(x, seed)
                                  ==>    received = all_to_all_single(codes)
                                         y        = dct.dequantize_rows(received)

The backward is encoded by itself, in the same way. A sum is taken of the decoded rows of all ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.codecs import DENSE, asked_for, codec_of
from dct_compile.schemes.offer import Declined
from dct_compile.schemes.quantized import Coding, QuantizedOffer, coding_of, offered
from dct_compile.schemes.rows import addends, averaged, carry
from dct_compile.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class QuantizedRows(QuantizedOffer):
    """An offer of the scheme "quantized_rows"."""

    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._exchange(x, self.exchange, comm), ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        assert self.exchange.backward is not None
        return self._exchange(dy, self.exchange.backward, comm)

    def encode(self, x: Tensor) -> Tensor:
        """Returns the codes of ``x`` [R, ...] as one message, uint8 [blocks, bytes]."""
        return self.coding.encode(x.reshape(-1, self.coding.block), self.exchange.number, site=self.exchange.label)

    def payload_for(self, x: Tensor) -> Tensor:
        """Returns an empty message for the codes of a tensor like ``x`` [R, ...]."""
        return torch.empty([x.numel() // self.coding.block, self.coding.block_bytes], dtype=torch.uint8, device=x.device)

    def decode(self, payload: Tensor, x: Tensor) -> Tensor:
        """Returns the rows of a message, with the shape and dtype of ``x``."""
        return self.coding.decode(payload, x.dtype, site=self.exchange.label).view(x.shape)

    def _exchange(self, x: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
        names, carrier = {"site": exchange.label}, exchange.collective.carrier
        codes = self.coding.encode(x.reshape(-1, self.coding.block), exchange.number, **names, sends=carrier)
        received = carry(codes, exchange, comm.splitting(self.coding.blocks_of_row(x)))
        blocks = self.coding.decode(received, x.dtype, **names, receives=carrier)
        if addends(exchange) == 1:
            return blocks.reshape(-1, *x.shape[1:])
        return averaged(blocks.reshape(addends(exchange), -1, *x.shape[1:]).sum(0), exchange)


def offer(exchange: Exchange, config: DCTConfig) -> QuantizedRows | Declined | None:
    """Offers integer codes for the rows of an activation, an embedding, or the gradient of one."""
    coding = coding_of(exchange, config)
    if codec_of(exchange, config) == DENSE:
        return Declined(Reason.CODEC_DENSE.format(option=asked_for(exchange, config)[0]))
    if not isinstance(coding, Coding):
        return Declined(coding) if coding is not None else None
    return offered(QuantizedRows, "quantized_rows", Reason.QUANTIZED, exchange, coding, _traffic)


def _traffic(exchange: Exchange, coding: Coding) -> Traffic:
    payload = coding.blocks(exchange) * coding.block_bytes
    return exchange.sent_encoded(payload).passing_over(3 * exchange.input_bytes + (1 + addends(exchange)) * payload)
