"""Joins the messages of the buckets of one backward.

::

    bucket 0   pack, all_gather, unpack            pack
    bucket 1   pack, all_gather, unpack    ==>     pack
    bucket 2   pack, all_gather, unpack            pack, one all_gather, unpack, unpack, unpack

A bucket is packed when DDP hands it over, so its passes over memory run beside the backward. Its message waits for those of later buckets.
The order and the sizes of the buckets alone decide which messages are joined, so all ranks join alike, whatever their timing.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dct_compile.comm import Comm
from dct_compile.integrations.suspended import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Request, Suspended
from dct_compile.link import ONE_MACHINE, Link

_ETHERNET = Link(1.25e9)
"""What a link is taken for where it is not known: 10 Gbit/s."""


def join_bytes(link: Link | None, ranks: int) -> int:
    """Returns the bytes below which a message costs more by its latency than by its bytes: those that a rank sends for one collective.

    Args:
        link: The link of the group, ``None`` where it is not known.
        ranks: The ranks of the group. A ring passes on a message ``ranks`` - 1 times.
    """
    known = link if link is not None else _ETHERNET
    # On one machine everything is dense, and there is nothing to join.
    return round(known.latency_s * (ranks - 1) * known.bytes_per_s) if known != ONE_MACHINE else 0


@dataclass(eq=False)
class _Bucket:
    """A bucket whose result is not there yet. ``steps``: its function, which waits for the results of ``requests``."""

    steps: Suspended
    comm: Comm
    promise: "torch.futures.Future[Tensor]"
    requests: Sequence[Request] = ()


class MessageJoiner:
    """Reduces the buckets of one DDP module in their order, and joins their messages.

    ``limit``: buckets are joined until they send that many bytes with each message.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: list[_Bucket] = []
        self._bytes = 0
        self._error: Exception | None = None

    @torch.no_grad()
    def reduce(self, bucket: Suspended, size: int, comm: Comm, promise: "torch.futures.Future[Tensor]", *, first: bool, last: bool) -> None:
        """Reduces a bucket; its result may come with that of a later one, with that of the last one at the latest.

        After an error nothing more is sent in this backward: a message without one of its buckets is not what the other ranks expect.

        Args:
            bucket: Its function, not yet begun. One that yields no requests sends its messages itself.
            size: Bytes of each message that it requests.
            comm: The group of the exchange, the same for all buckets.
            promise: Takes the result.
            first: Whether a backward begins with this bucket.
            last: Whether it ends with this bucket.

        Raises:
            Exception: An error of this bucket, or of one that it is joined with. The promises of the buckets after it get the same error.
        """
        if first:
            self.drop()
            self._error = None
        if self._error is not None:
            promise.set_exception(self._error)  # type: ignore[arg-type]
            return
        self._open.append(_Bucket(bucket, comm, promise))
        self._bytes += size
        try:
            self._go_on(self._open[-1], None)
            if last or self._bytes >= self.limit:
                self._finish()
        except Exception as error:
            self._error = error
            raise

    def drop(self) -> "list[torch.futures.Future[Tensor]]":
        """Forgets the buckets whose results are not there. Returns the promises of these results."""
        promises = [bucket.promise for bucket in self._open]
        self._open, self._bytes = [], 0
        return promises

    def _finish(self) -> None:
        while self._open:
            waiting = list(self._open)
            results = iter(send([request for bucket in waiting for request in bucket.requests], waiting[0].comm))
            for bucket in waiting:
                self._go_on(bucket, [next(results) for _ in bucket.requests])
        self._bytes = 0

    def _go_on(self, bucket: _Bucket, results: list[Tensor] | None) -> None:
        """Runs the function of ``bucket`` up to its next requests, or to its end."""
        try:
            bucket.requests = next(bucket.steps) if results is None else bucket.steps.send(results)
        except StopIteration as end:
            self._open.remove(bucket)
            bucket.promise.set_result(end.value)


def send(requests: Sequence[Request], comm: Comm) -> list[Tensor]:
    """Sends all requests of the same collective and dtype in one message. Returns their results, in order."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for place, request in enumerate(requests):
        alike[request.collective, request.op, request.x.dtype].append(place)
    started = [(places, _start([requests[place] for place in places], comm)) for places in alike.values()]
    results: dict[int, Tensor] = {}
    for places, message in started:
        results.update(zip(places, _divide(comm.wait(message), [requests[place] for place in places], comm), strict=True))
    return [results[place] for place in range(len(requests))]


def _start(requests: Sequence[Request], comm: Comm) -> Tensor:
    """Starts the collective of all ``requests``, which are alike, with their inputs end to end in the share of each rank."""
    rows = comm.size if requests[0].collective is ALL_TO_ALL else 1
    inputs = [request.x.reshape(rows, -1) for request in requests]
    joined = (torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]).view(-1)
    if requests[0].collective is ALL_TO_ALL:
        return comm.all_to_all(joined)
    return comm.all_gather(joined) if requests[0].collective is ALL_GATHER else comm.all_reduce(joined, requests[0].op)


def _divide(joined: Tensor, requests: Sequence[Request], comm: Comm) -> Iterator[Tensor]:
    """Returns the result of each request out of that of all."""
    rows = 1 if requests[0].collective is ALL_REDUCE else comm.size
    shares = rows if requests[0].collective is ALL_TO_ALL else 1
    parts = joined.view(rows, -1).split([request.x.numel() // shares for request in requests], 1)
    for request, part in zip(requests, parts, strict=True):
        x = request.x
        yield part.reshape(comm.size * x.shape[0], *x.shape[1:]) if request.collective is ALL_GATHER else part.reshape(x.shape)
