"""Divides the parameters of a gradient buffer: those that a scheme compresses, and those that stay dense beside them."""

import fnmatch
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.element_order import ElementOrder
from dct_compile.exchange import Exchange, Parameter, Segment
from dct_compile.reasons import Reason
from dct_compile.traffic import NOTHING, Traffic


@dataclass(frozen=True)
class Members:
    """The parameters of a gradient buffer of ``numel`` elements: ``compressed``, and the ``rest``, in order of offset."""

    numel: int
    compressed: tuple[Segment, ...]
    rest: tuple[Segment, ...]

    @property
    def numels(self) -> tuple[int, ...]:
        """Elements of each compressed parameter."""
        return tuple(segment.parameter.numel for segment in self.compressed)

    def densities(self, config: DCTConfig) -> tuple[float, ...]:
        """Returns the fraction of each compressed parameter that a scheme is to keep."""
        return tuple(config.density_of(segment.parameter.name) for segment in self.compressed)

    @property
    def orders(self) -> tuple[ElementOrder | None, ...]:
        """The order of the elements of each compressed parameter in the buffer."""
        return tuple(segment.parameter.order for segment in self.compressed)

    @property
    def rest_names(self) -> str:
        return ", ".join(segment.parameter.name for segment in self.rest)

    @property
    def rest_numel(self) -> int:
        """Elements of the rest."""
        return sum(segment.parameter.numel for segment in self.rest)

    def rest_traffic(self, exchange: Exchange) -> Traffic:
        """Returns the work of an all_reduce of the rest alone."""
        assert exchange.dtype is not None
        size = self.rest_numel * exchange.dtype.itemsize
        return exchange.collective.sent(size, exchange.ranks).passing_over(2 * size) if self.rest else NOTHING

    def start_rest(self, grad: Tensor, comm: Comm, exchange: Exchange) -> Tensor | None:
        """Starts the all_reduce of the rest, end to end; ``None`` where there is none."""
        if not self.rest:
            return None
        return comm.all_reduce(self.rest_of(grad), exchange.reduce_op)

    def rest_of(self, grad: Tensor) -> Tensor:
        """Returns the rest of ``grad``, end to end."""
        return torch.cat([_part(grad, segment) for segment in self.rest])

    @staticmethod
    def end_rest(started: Tensor | None) -> Generator[Tensor, Tensor, Tensor | None]:
        """Yields what :meth:`start_rest` has started, and returns the result that it is sent; ``None`` where there is no rest."""
        return None if started is None else (yield started)

    def split(self, grad: Tensor) -> list[Tensor]:
        """Returns the parts of ``grad`` that are compressed, each 1-D and in row-major order."""
        parts = [_part(grad, segment) for segment in self.compressed]
        return [part if order is None else order.to_row_major(part) for part, order in zip(parts, self.orders, strict=True)]

    def join(self, parts: list[Tensor], rest: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Builds the buffer from the results of the compressed parameters, as :meth:`split` returns them, and of the rest, end to end.

        ``out``: the memory that is to hold it; ``None`` for a new tensor.
        """
        laid_out = [part if order is None else order.to_buffer(part) for part, order in zip(parts, self.orders, strict=True)]
        found = dict(zip(self.compressed, laid_out, strict=True))
        if rest is not None:
            found |= dict(zip(self.rest, rest.split([segment.parameter.numel for segment in self.rest]), strict=True))
        return torch.cat([found[segment] for segment in sorted(found, key=lambda segment: segment.offset)], out=out)


def _part(grad: Tensor, segment: Segment) -> Tensor:
    return grad[segment.offset : segment.offset + segment.parameter.numel]


def divide(exchange: Exchange, config: DCTConfig, refuse: Callable[[Parameter], str | None] = lambda parameter: None) -> Members | str:
    """Divides the parameters of ``exchange``; returns the reasons as text where none is compressed.

    Args:
        exchange: the exchange of a gradient buffer.
        config: its ``min_numel`` and ``exempt`` keep parameters dense.
        refuse: returns the reason why a scheme cannot compress a parameter.
    """
    reasons: Mapping[Segment, str | None] = {
        segment: _exempt(segment.parameter, config) or refuse(segment.parameter) for segment in exchange.segments
    }
    compressed = tuple(segment for segment in exchange.segments if reasons[segment] is None)
    if not compressed:
        return "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason is not None))
    rest = sorted((segment for segment in exchange.segments if reasons[segment] is not None), key=lambda segment: segment.offset)
    assert exchange.shape is not None
    return Members(torch.Size(exchange.shape).numel(), compressed, tuple(rest))


def _exempt(parameter: Parameter, config: DCTConfig) -> str | None:
    if parameter.numel < config.min_numel:
        return Reason.MIN_NUMEL.format(min_numel=config.min_numel)
    for pattern in config.exempt:
        if fnmatch.fnmatchcase(parameter.name, pattern):
            return Reason.EXEMPT.format(pattern=pattern)
    return None


def said_too_large(scheme: str, exchange: Exchange, traffic: Traffic) -> str:
    """Returns the report's words for an offer that sends more than the dense collective."""
    sizes = {"wire": traffic.wire_bytes, "dense": exchange.dense_traffic.wire_bytes}
    return Reason.GRADIENT_TOO_LARGE.format(scheme=scheme, ranks=exchange.ranks, **sizes)
