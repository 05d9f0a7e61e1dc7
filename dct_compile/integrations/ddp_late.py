"""Lets DDP's gradients arrive one step later (``arrival="late"``): their exchange runs beside the optimizer and the next step.

The hook hands out the mean of the step before, and copies what it sends: DDP writes to its buffer as soon as it has that mean. The exchange
then runs on the worker's thread, or on a side stream. Whoever reads the state of the bucket waits for it (``state/bucket.py``).

What stays dense arrives now, in collectives of DDP's own process group: they need not wait for the exchanges in the background. DDP would
start them there in the same order.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dct_compile.comm import Comm
from dct_compile.schemes.late import Late
from dct_compile.state.bucket import BucketState
from dct_compile.workers import ExchangeWorker

Wait = Callable[[], None]
Start = Callable[[Callable[[], None]], Wait]
"""Starts a task beside the training. The result waits for its end, and raises its error."""


def reduce_late(
    late: Late, state: BucketState, buffer: Tensor, comm: Comm, group: ProcessGroup, start: Start
) -> torch.futures.Future[Tensor]:
    """Returns the mean of the step before, and starts the exchange of this step.

    Args:
        late: The offer for the bucket.
        state: Its state, ready for an exchange.
        buffer: DDP's buffer [numel]; it may be written to when the result is there.
        comm: The group of the exchanges in the background.
        group: DDP's own group, over which the dense parameters are averaged.
        start: Starts the exchange.

    Returns:
        The future of the averaged buffer.
    """
    tensors = state.tensors
    with torch.no_grad():
        arrived, compressed, rest = late.arrived(tensors, buffer.dtype), late.compressed(buffer), late.rest(buffer)
        blank = ~arrived.any()
        for use in state.pending.uses:
            use.blank = blank if buffer.is_cuda else bool(blank)
        result = _done(late.join(arrived, None, buffer)) if rest is None else average(rest, group, partial(_joined, late, arrived))
        state.under_way = start(lambda: late.send(compressed, tensors, comm, in_place=True))
    return result


def average(tensor: Tensor, group: ProcessGroup, use: Callable[[Tensor], Tensor] = lambda mean: mean) -> torch.futures.Future[Tensor]:
    """Starts the averaging of ``tensor``, in place, in the order of the calls. Returns the future of ``use(mean)``."""

    def used(future: "torch.futures.Future[Any]") -> Tensor:
        return use(future.value()[0])

    work = dist.all_reduce(tensor, dist.ReduceOp.AVG, group=group, async_op=True)
    assert work is not None
    averaged: torch.futures.Future[Tensor] = work.get_future().then(used)
    return averaged


def on_worker(worker: ExchangeWorker, explain: Callable[[Exception], None]) -> Start:
    """Returns a function that starts tasks on the thread of ``worker``. ``explain``: adds to an error what is known about its cause."""

    def start(task: Callable[[], None]) -> Wait:
        done: Future[None] = Future()

        def run() -> None:
            try:
                with torch.no_grad():
                    task()
                done.set_result(None)
            except Exception as error:
                explain(error)
                done.set_exception(error)

        worker.submit(run)
        return done.result

    return start


def on_stream(stream: torch.cuda.Stream) -> Start:
    """Returns a function that starts tasks on ``stream``. The host waits at no place."""

    def start(task: Callable[[], None]) -> Wait:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            task()
            ended = stream.record_event()
        return partial(_wait_for, ended, stream.device, task)

    return start


def _wait_for(ended: torch.cuda.Event, device: torch.device, task: Callable[[], None]) -> None:
    """Lets the current stream wait. ``task`` holds the tensors that the side stream reads: until then their memory is not used again."""
    torch.cuda.current_stream(device).wait_event(ended)


def _joined(late: Late, arrived: Tensor, mean: Tensor) -> Tensor:
    if mean.is_cuda:  # torch calls back on a stream of its own
        arrived.record_stream(torch.cuda.current_stream(mean.device))
    return late.join(arrived, mean)


def _done(result: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[result.device] if result.is_cuda else None)
    future.set_result(result)
    return future
