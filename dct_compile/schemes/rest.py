"""Carries the parameters that stay dense behind the chunks of a payload, so that they take no message of their own.

::

    payload  chunk                        chunk, rest                    "gather": every rank sums the rest of all ranks
             chunk 0 | chunk 1 | ...  ==> chunk 0, share 0 | chunk 1, share 1 | ...      "owner": a share of the rest for each owner

The rest travels in the dtype of the gradient. It is summed in float32, in the order of the ranks, so all ranks get the same values.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from dct_compile.exchange import ALL_TO_ALL, Exchange
from dct_compile.schemes.members import Members
from dct_compile.traffic import Traffic, one_share_to_each, to_all

MESSAGE_BYTES = 16 * 1024
"""Bytes on the wire that take about as long as the message that they save: 1.3 ms at 100 Mbit/s, 0.13 ms at 1 Gbit/s."""


@dataclass(frozen=True)
class Rider:
    """The rest of a buffer: ``numel`` elements of ``dtype``, behind the chunks of ``ranks`` ranks.

    ``shares``: 1 where each chunk carries all of it, else the number of ranks. ``divisor``: of the sum over the ranks.
    """

    numel: int
    dtype: torch.dtype
    ranks: int
    divisor: int
    shares: int

    @classmethod
    def of(cls, members: Members, exchange: Exchange, payload_bytes: int, first: str) -> "Rider | None":
        """Returns how the rest travels behind a payload; ``None`` where there is none, or where a message of its own is better.

        That is the case for a rest that is larger than the payload, and for one that many ranks would gather. Decided by sizes alone.

        Args:
            members: The parameters of the buffer.
            exchange: Its exchange.
            payload_bytes: Bytes of the payload without the rest.
            first: The collective that carries the payload: with :data:`ALL_TO_ALL` each rank sums a share.
        """
        assert exchange.dtype is not None
        shares = exchange.ranks if first == ALL_TO_ALL else 1
        rider = cls(members.rest_numel, exchange.dtype, exchange.ranks, exchange.divisor, shares)
        return rider.if_it_pays(payload_bytes, members.rest_traffic(exchange))

    def if_it_pays(self, payload_bytes: int, alone: Traffic) -> "Rider | None":
        """Returns this rider; ``None`` where it carries nothing, or where a message of its own is better, whose work is ``alone``."""
        more = self.traffic(0).wire - alone.wire
        small = self.numel * self.dtype.itemsize <= max(payload_bytes, MESSAGE_BYTES)
        return self if self.numel and small and more <= MESSAGE_BYTES else None

    @property
    def share(self) -> int:
        """Elements behind each chunk."""
        return -(-self.numel // self.shares)

    def traffic(self, chunk_bytes: int) -> Traffic:
        """Returns what the rest adds to the messages that carry it.

        ``chunk_bytes``: bytes of each chunk, which are copied when they are joined with the rest and separated from it.
        """
        size = self.share * self.dtype.itemsize
        moved = 2 * (self.shares + self.ranks) * (chunk_bytes + size)
        if self.shares == 1:
            return to_all(size, self.ranks).riding().passing_over(moved)
        summed = one_share_to_each(self.shares * size, self.ranks) + to_all(size, self.ranks)
        return summed.riding().passing_over(moved + 2 * (1 + self.ranks) * (chunk_bytes + size))

    def attach(self, chunks: Tensor, rest: Tensor, count: int = 1) -> Tensor:
        """Puts a share of ``rest`` behind each of ``count`` ``chunks`` (uint8, end to end): uint8 [bytes]."""
        padding = count * self.share - rest.numel()
        shares = (torch.nn.functional.pad(rest, (0, padding)) if padding else rest).view(count, -1)
        return torch.cat([chunks.view(count, -1), shares.view(torch.uint8)], 1).view(-1)

    def detach(self, received: Tensor) -> tuple[Tensor, Tensor]:
        """Separates the chunks of all ranks (uint8, end to end) from the rest behind them (``dtype`` [ranks, share])."""
        rows = received.view(self.ranks, -1)
        end = rows.shape[1] - self.share * self.dtype.itemsize
        # Copies, because a chunk may have a length at which the next one is not aligned.
        return rows[:, :end].contiguous().view(-1), rows[:, end:].contiguous().view(self.dtype)

    def mean(self, addends: Tensor) -> Tensor:
        """Adds up ``addends`` [ranks, n] in order and divides: [n] of their dtype."""
        total = reduce(torch.add, addends.float().unbind())
        return (total if self.divisor == 1 else total / self.divisor).to(self.dtype)
