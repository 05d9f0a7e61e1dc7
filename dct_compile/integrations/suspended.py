"""Suspends the function of a scheme at its collectives, so that others may send its messages, joined with more.

::

    payload  = pack(grad)                 runs
    started  = comm.all_gather(payload)   noted as a Request, not started
    gathered = yield started              yields the requests; goes on with their results, whoever has sent them
    mean     = unpack(gathered)           runs
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dct_compile.comm import Comm, Steps

ALL_GATHER, ALL_TO_ALL, ALL_REDUCE = "all_gather", "all_to_all", "all_reduce"


@dataclass(frozen=True)
class Request:
    """A collective to be sent, over a group that is known: ``collective`` of ``x``. ``op``: the operation of an all_reduce."""

    collective: str
    x: Tensor
    op: str = ""


Suspended = Generator[list[Request], list[Tensor], Tensor]
"""A function under way: it yields requests, is sent their results in the same order, and returns its own result."""


@dataclass(frozen=True)
class _Noting(Comm):
    """Notes collectives in place of starting them: ``noted`` has the empty tensor that stands for each result, and the request."""

    noted: list[tuple[Tensor, Request]] = field(default_factory=list)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._note(Request(ALL_GATHER, x), (self.size * x.shape[0], *x.shape[1:]))

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._note(Request(ALL_TO_ALL, x), tuple(x.shape))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return self._note(Request(ALL_REDUCE, x, op), tuple(x.shape))

    def _note(self, request: Request, shape: tuple[int, ...]) -> Tensor:
        token = torch.empty(shape, dtype=request.x.dtype, device="meta")
        self.noted.append((token, request))
        return token


def suspended(function: Callable[[Comm], Steps], comm: Comm) -> Suspended:
    """Runs ``function(comm)`` up to each result of a collective that it needs.

    Args:
        function: The function; all of its collectives come from the argument.
        comm: The group of the collectives.

    Yields:
        The collectives that were reached since the last time.

    Returns:
        The result of the function.
    """
    noting, arrived = _Noting(comm.group, comm.size), dict[Tensor, Tensor]()  # a tensor is a key by its identity
    steps = function(noting)
    try:
        needed = next(steps)
        while True:
            if needed not in arrived:
                answers = yield [request for _, request in noting.noted]
                arrived |= {token: answer for (token, _), answer in zip(noting.noted, answers, strict=True)}
                noting.noted.clear()
            needed = steps.send(arrived.pop(needed))
    except StopIteration as end:
        result: Tensor = end.value
        return result
