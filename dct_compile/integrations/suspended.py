"""Suspends the function of a scheme at its collectives: it runs in a thread of its own, and stands still while others send its messages.

::

    payload  = pack(grad)                 runs
    gathered = comm.all_gather(payload)   noted as a Request, not started
    waited   = comm.wait(gathered)        yields the requests; goes on with their results, whoever has sent them
    mean     = unpack(waited)             runs

A trace would do without threads, but torch traces for the whole process: another thread could not call a compiled model meanwhile.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from dct_compile.comm import Comm

ALL_GATHER, ALL_TO_ALL, ALL_REDUCE = "all_gather", "all_to_all", "all_reduce"


@dataclass(frozen=True)
class Request:
    """A collective to be sent, over a group that is known: ``collective`` of ``x``. ``op``: the operation of an all_reduce."""

    collective: str
    x: Tensor
    op: str = ""


Steps = Generator[list[Request], list[Tensor], Tensor]
"""A function under way: it yields requests, is sent their results in the same order, and returns its own result."""


@dataclass(frozen=True)
class _Noting(Comm):
    """Notes collectives in place of starting them. A result that nobody has sent yet is an empty tensor of its shape."""

    yields: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    answers: SimpleQueue[list[Tensor] | None] = field(default_factory=SimpleQueue)
    reached: dict[int, tuple[Tensor, Request]] = field(default_factory=dict)
    results: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._note(Request(ALL_GATHER, x), (self.size * x.shape[0], *x.shape[1:]))

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._note(Request(ALL_TO_ALL, x), tuple(x.shape))

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        return self._note(Request(ALL_REDUCE, x, op), tuple(x.shape))

    def wait(self, x: Tensor) -> Tensor:
        if id(x) in self.reached:
            self.yields.put([request for _, request in self.reached.values()])
            answers = self.answers.get()
            if answers is None:
                raise RuntimeError("the exchange was given up")
            for (key, (token, _)), answer in zip(self.reached.items(), answers, strict=True):
                self.results[key] = token, answer  # a token that lives keeps its id
            self.reached.clear()
        return self.results[id(x)][1]

    def _note(self, request: Request, shape: tuple[int, ...]) -> Tensor:
        token = torch.empty(shape, dtype=request.x.dtype, device="meta")
        self.reached[id(token)] = token, request
        return token


def run(function: Callable[[Comm], Tensor], comm: Comm, device: torch.device) -> Steps:
    """Runs ``function(comm)`` up to each wait, without gradients.

    Args:
        function: The function; all of its collectives come from the argument.
        comm: The group of the collectives.
        device: The device of its tensors: a kernel runs on the stream that is current there when the function begins.

    Yields:
        The collectives that were reached since the last time.

    Returns:
        The result of the function.

    Raises:
        BaseException: The error of the function.
    """
    noting = _Noting(comm.group, comm.size)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(stream) if stream is not None else nullcontext():
                noting.yields.put(function(noting))
        except BaseException as error:
            noting.yields.put(error)

    threading.Thread(target=work, name="dct-bucket", daemon=True).start()
    try:
        while isinstance(found := noting.yields.get(), list):
            noting.answers.put((yield found))
    except GeneratorExit:
        noting.answers.put(None)
        raise
    if isinstance(found, BaseException):
        raise found
    return found  # type: ignore[no-any-return]
