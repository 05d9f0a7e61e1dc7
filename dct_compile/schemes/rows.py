"""The guards and the exchanges that schemes for rows share: activations and embeddings, forward and backward."""

from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.exchange import ALL_GATHER, Exchange
from dct_compile.reasons import Reason


def refuse_rows(exchange: Exchange) -> str | None:
    """Returns the reason why no scheme for rows can carry ``exchange``, if there is one."""
    if exchange.shape is None or len(exchange.shape) < 2:
        return Reason.NO_ROWS
    return Reason.DYNAMIC_WIDTH if not exchange.static_width else None


def carry(payload: Tensor, exchange: Exchange, comm: Comm) -> Tensor:
    """Sends an encoded input as the collective would send it, and waits for it: sums cannot be taken of encoded rows."""
    gathers = exchange.collective.carrier == ALL_GATHER
    return comm.wait(comm.all_gather(payload) if gathers else comm.all_to_all(payload))


def addends(exchange: Exchange) -> int:
    """Returns how many encoded rows make one row of the result."""
    return exchange.ranks if exchange.collective.sums else 1


def averaged(total: Tensor, exchange: Exchange) -> Tensor:
    """Divides a sum by the number of ranks where the collective averages."""
    return total / exchange.divisor if exchange.divisor > 1 else total
