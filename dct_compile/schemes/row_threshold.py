"""Row threshold [Gupta21]: the largest entries of each row travel, and the gradient returns at the same entries.

Here an all_to_all::

    y  = all_to_all_single(x)            payload  = dct.pack_rows(x)              values and their indices, for each row
                                         received = all_to_all_single(payload)
                                  ==>    y        = dct.unpack_rows(received)
    dx = all_to_all_single(dy)           values   = dct.gather_rows(dy, received) at the indices that the receiver already has
                                         returned = all_to_all_single(values)     no index travels backward
                                         dx       = dct.scatter_rows(returned, payload)

An all_gather keeps its all_gather. Its backward, a reduce_scatter, becomes an all_to_all of the values at each owner's indices, which are
added where they arrive. A reduce_scatter becomes an all_to_all, an all_reduce an all_gather; the sum is taken while unpacking. A
row-parallel layer's all_reduce has no collective in its backward: there the mask is applied to the gradient in place.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.exchange import ACTIVATION, ALL_TO_ALL, EMBEDDING, FOREIGN, Exchange
from dct_compile.reasons import Reason
from dct_compile.schemes.codecs import THRESHOLD, codec_of, has_mask, kept_of
from dct_compile.schemes.offer import Declined, RowOffer
from dct_compile.schemes.rows import addends, averaged, carry, refuse_rows
from dct_compile.triton_kernels.layout import RowLayout, row_bytes

dct = torch.ops.dct
MAX_ROW = 16384


@dataclass(frozen=True, kw_only=True)
class RowThreshold(RowOffer):
    """An offer of the scheme "row_threshold": ``capacity`` entries of each row, chosen by ``method``."""

    capacity: int
    value_dtype: torch.dtype
    method: str
    target: float
    fixed: float

    def forward(self, x: Tensor, comm: Comm) -> tuple[Tensor, tuple[Tensor, ...]]:
        site, carrier = self.exchange.label, self.exchange.collective.carrier
        rows = self._layout(x)
        payload = dct.pack_rows(x, rows, self.method, self.target, self.fixed, site=site, sends=carrier)
        received = carry(payload, self.exchange, comm)
        y = dct.unpack_rows(received, rows, addends(self.exchange), x.dtype, site=site, receives=carrier)
        return averaged(y, self.exchange), (payload, received)

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], comm: Comm) -> Tensor:
        twin = self.exchange.backward
        assert twin is not None
        payload, received = saved
        rows, names = self._layout(dy), {"site": twin.label}
        values = dct.gather_rows(dy, received, rows, self.value_dtype, **names, sends=ALL_TO_ALL)
        returned = comm.wait(comm.all_to_all(values))
        dx = dct.scatter_rows(returned, payload, rows, addends(twin), dy.dtype, **names, receives=ALL_TO_ALL)
        return averaged(dx, twin)

    def local_backward(self, dy: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        rows, site = self._layout(dy), f"{self.exchange.label} backward"
        values = dct.gather_rows(dy, saved[0], rows, dy.dtype, site=site)
        dx: Tensor = dct.scatter_rows(values, saved[0], rows, 1, dy.dtype, site=site)
        return dx

    def _layout(self, x: Tensor) -> RowLayout:
        return RowLayout(tuple(int(size) for size in x.shape[1:]), self.capacity, self.value_dtype)


def offer(exchange: Exchange, config: DCTConfig) -> RowThreshold | Declined | None:
    """Offers the largest entries of each row, for what a ReLU has left, or where the options ask for it."""
    if codec_of(exchange, config) != THRESHOLD:
        return None
    if config.mp_density == 1:
        return Declined(Reason.MP_DENSITY_ONE)
    if (reason := _refused(exchange)) is not None:
        return Declined(reason)
    width, kept = exchange.width, kept_of(exchange.width, config)
    if kept is None:
        return Declined(Reason.SHORT_ROW.format(width=width, density=config.mp_density))
    method = "exact" if config.threshold_method == "sampled" else config.threshold_method
    capacity = kept if method == "exact" else min(width, ceil(kept * config.capacity_factor))
    return _sized(exchange, config, capacity, method)


def _refused(exchange: Exchange) -> str | None:
    """Returns the reason why no mask can be made for ``exchange``, if there is one."""
    if exchange.kind not in (ACTIVATION, EMBEDDING):
        return Reason.NO_FORWARD
    if exchange.origin == FOREIGN:
        return Reason.FOREIGN
    if (reason := refuse_rows(exchange)) is not None:
        return reason
    if not exchange.static_rows:
        return Reason.DYNAMIC_SIZE
    if exchange.width > MAX_ROW:
        return Reason.WIDE_ROW.format(width=exchange.width, limit=MAX_ROW)
    return None if has_mask(exchange) else Reason.NO_LOCAL_GRADIENT


def _sized(exchange: Exchange, config: DCTConfig, capacity: int, method: str) -> RowThreshold:
    assert exchange.dtype is not None
    width, twin = exchange.width, exchange.backward
    one_row = row_bytes(width, capacity, config.mp_dtype)
    payload, size = exchange.rows * one_row, exchange.rows * width * exchange.dtype.itemsize
    returned = None
    if twin is not None:
        copies = addends(exchange)  # each rank whose rows were added sees the gradient at its own entries
        values = twin.rows * copies * capacity * config.mp_dtype.itemsize
        returned = twin.sent_by_all_to_all(values).passing_over(2 * values + copies * size)
    return RowThreshold(
        exchange=exchange,
        scheme="row_threshold",
        reason=Reason.ROW_THRESHOLD.format(capacity=capacity, width=width),
        too_large=Reason.ROW_TOO_LARGE.format(wire=one_row, dense=width * exchange.dtype.itemsize),
        traffic=exchange.sent_encoded(payload).passing_over(2 * size + (1 + addends(exchange)) * payload),
        digest=f"{capacity} of {width}, {config.mp_value_dtype} values, {method}",
        density=capacity / width,
        backward_traffic=returned,
        backward_reason=str(Reason.FOLLOWS_FORWARD),
        capacity=capacity,
        value_dtype=config.mp_dtype,
        method=method,
        target=config.mp_density,
        fixed=config.fixed_threshold,
    )
