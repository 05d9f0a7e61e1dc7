"""Quantised sums in two steps: each rank adds up a share of the rows, so the bytes do not grow with the number of ranks.

::

    y = all_reduce(x)          codes    = dct.quantize_rows(x)                  a share for each rank
                               received = all_to_all_single(codes)
                       ==>     sums     = dct.dequantize_rows(received).sum()   this rank's share, in float32
                               again    = dct.quantize_rows(sums)
                               gathered = all_gather_into_tensor(again)         all ranks decode the same codes
                               y        = dct.dequantize_rows(gathered)

The first step is the quantised reduce_scatter of ZeRO++ (Wang et al., 2023). Both steps round stochastically. For two ranks one step sends
as few bytes ("quantized_rows").
"""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.quantized import Coding, QuantizedOffer, coding_of, largest_part, offered
from dct_compile.schemes.rows import averaged
from dct_compile.traffic import Traffic

SHARED = 128
"""Elements of the largest block. Every rank adds up as many blocks, so small ones leave less to be filled up."""


@dataclass(frozen=True, kw_only=True)
class QuantizedSum(QuantizedOffer):
    """An offer of the scheme "quantized_sum"."""

    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._sum(x, self.exchange, comm), ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        assert self.exchange.backward is not None
        return self._sum(dy, self.exchange.backward, comm)

    def _sum(self, x: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
        coding, names, ranks = self.coding, {"site": exchange.label}, exchange.ranks
        blocks = x.reshape(-1, coding.block)
        count = blocks.shape[0]
        padded = pad(blocks, (0, 0, 0, -count % ranks))
        received = comm.wait(comm.all_to_all(coding.encode(padded, exchange.number, **names, sends=ALL_TO_ALL)))
        share = coding.decode(received, torch.float32, **names, receives=ALL_TO_ALL).reshape(ranks, -1, coding.block).sum(0)
        codes = coding.encode(averaged(share, exchange), exchange.number, **names, sends=ALL_GATHER)
        gathered = comm.wait(comm.all_gather(codes))
        return coding.decode(gathered, x.dtype, **names, receives=ALL_GATHER)[:count].reshape(x.shape)


def offer(exchange: Exchange, config: DCTConfig) -> QuantizedSum | None:
    """Offers integer codes, twice, for the sum of an activation or its gradient. What declines is said by "quantized_rows"."""
    if exchange.collective.name != ALL_REDUCE or exchange.ranks <= 2:
        return None
    whole = coding_of(exchange, config)
    if not isinstance(whole, Coding):
        return None
    coding = Coding(whole.bits, largest_part(whole.block, SHARED))
    return offered(QuantizedSum, "quantized_sum", Reason.QUANTIZED_SUM, exchange, coding, _traffic)


def _traffic(exchange: Exchange, coding: Coding) -> Traffic:
    """Counts two steps. One row stands for any number of them, of which no padding is known."""
    ranks, blocks = exchange.ranks, coding.blocks(exchange)
    padded = blocks + -blocks % ranks if exchange.rows > 1 else blocks
    payload = padded * coding.block_bytes
    return Traffic(2, Fraction(2 * (ranks - 1) * payload, ranks), ranks).passing_over(4 * exchange.input_bytes + 4 * payload)
