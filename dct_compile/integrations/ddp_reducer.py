"""Averages the gradient buckets of one DDP module: calls the function of a scheme where DDP would call all_reduce.

On CPU the function runs on a worker thread with a process group of its own (``workers.py``). So a bucket never blocks the backward that
fills the next one, and the exchanges of several buckets come in the same order on every rank. On CUDA it runs on a side stream. The
messages of small buckets are joined (``ddp_join.py``). With option ``arrival="late"`` it runs beside the next step, too (``ddp_late.py``).
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from dct_compile.comm import HostsComm
from dct_compile.config import DCTConfig
from dct_compile.groups import ranks_per_host
from dct_compile.integrations.ddp_join import MessageJoiner, join_bytes
from dct_compile.integrations.ddp_late import average, on_stream, on_worker, reduce_late
from dct_compile.integrations.ddp_plan import BucketPlan
from dct_compile.integrations.ddp_report import averaged_parameters, bucket_name, title_of
from dct_compile.integrations.suspended import Suspended, suspended
from dct_compile.link import Link
from dct_compile.measure import BucketMeasure
from dct_compile.phases import Phase, phase_at, phases_of
from dct_compile.reasons import Note, abbreviated
from dct_compile.runtime import Runtime
from dct_compile.schemes.late import Late
from dct_compile.state.bucket import BucketState, refer_to
from dct_compile.state.exchanges import count_exchange, exchanges_of
from dct_compile.state.loss_scale import NO_BACKWARD
from dct_compile.state.store import named_parameters
from dct_compile.workers import ExchangeWorker


class GradientCompressor:
    """The communication hook of one DDP module, and a reducer for each of its buckets.

    ``agree``: compares the decisions, which follow from the link, with those of the other ranks; called once, before the first exchange.
    """

    def __init__(self, module: DistributedDataParallel, config: DCTConfig, runtime: Runtime, agree: Callable[[Link | None], None]) -> None:
        self.find_unused = module.find_unused_parameters
        self.config, self.runtime, self.process_group, self.agree = config, runtime, module.process_group, agree
        self.title = title_of(module, runtime)
        self.phases = phases_of(config)
        self.names = {id(parameter): name for name, parameter in named_parameters(module)}
        self.parameters = [weakref.ref(parameter) for _, parameter in named_parameters(module)]
        # Parameters that no compiled graph was called with; a parameter that was not used at all cannot be told from those.
        self.uncompiled = {} if self.find_unused else {id(parameter): name for name, parameter in averaged_parameters(module)}
        self.worker: ExchangeWorker | None = None
        self.link: Link | None = None
        for handle in runtime.states.use.watch(list(module.parameters())):
            weakref.finalize(module, handle.remove)
        self.stream: torch.cuda.Stream | None = None
        self.joiner = MessageJoiner(0)
        # In its first backward a static graph numbers all buckets 0, and none is the last one: then nothing may wait.
        self.numbered = not module.static_graph
        self.reducers: dict[int, BucketReducer] = {}
        self.retired: list[BucketReducer] = []

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Starts the bucket's averaging and returns at once: the hook. Buckets come in the same order on all ranks."""
        buffer = bucket.buffer()
        worker = self.own_worker()
        phase = self._begin_exchange(bucket.parameters())
        reducer = self._reducer(bucket.index(), bucket.parameters(), worker, phase, buffer.is_sparse)
        if bucket.is_last():
            self._forget_retired()
            self._warn_of_uncompiled()
        # A rank that has no more inputs is called outside of a backward (``torch.distributed.algorithms.Join``).
        reducer.joined = torch._C._current_graph_task_id() == NO_BACKWARD
        if self.config.arrival == "late" and not (self.find_unused or buffer.is_sparse):
            return self._reduce_late(reducer, buffer, worker)
        self.numbered = self.numbered or bucket.index() > 0
        place = {"first": bucket.index() == 0, "last": bucket.is_last() or not self.numbered}
        if buffer.is_cuda:
            return self._reduce_on_side_stream(reducer, buffer, place)
        promise: torch.futures.Future[Tensor] = torch.futures.Future()
        result = promise.then(_result)  # before the worker runs, which would hold the interpreter's lock meanwhile
        worker.submit(partial(_run, self.joiner, reducer, buffer, promise, place))
        return result

    def mark_compiled(self, parameters: Sequence[object]) -> None:
        """Remembers that a compiled graph is called with ``parameters``."""
        for parameter in parameters:
            self.uncompiled.pop(id(parameter), None)

    def own_worker(self) -> ExchangeWorker:
        """Returns the worker of the exchanges, found when the first bucket is ready: then all ranks are here."""
        if self.worker is None:
            self.link = self.runtime.links.of(self.process_group, self.config.link)
            self.agree(self.link)
            self.joiner.limit = join_bytes(self.link, self.process_group.size())
            self.worker = self.runtime.workers.of(self.process_group)
        self.worker.take_over_timeout()
        return self.worker

    def _begin_exchange(self, parameters: Sequence[Tensor]) -> Phase:
        """Counts an exchange of a bucket's gradients. Returns the phase that it is in: that of its youngest parameter."""
        if len(self.phases) == 1:
            return self.phases[0]
        uses = self.runtime.states.use.of(parameters)
        if not all(use.agreed for use in uses):
            living = [parameter for ref in self.parameters if (parameter := ref()) is not None]
            named = [(self.names[id(parameter)], parameter) for parameter in living]
            self.runtime.agree_on_exchanges(self.process_group, self.config, named)
        phase = phase_at(self.phases, exchanges_of(uses))
        count_exchange(uses)
        return phase

    def _warn_of_uncompiled(self) -> None:
        if self.uncompiled:
            self.runtime.warn_once(Note.NOT_COMPILED.format(parameters=abbreviated(list(self.uncompiled.values()))))
            self.uncompiled = {}

    def _reduce_late(self, reducer: "BucketReducer", buffer: Tensor, worker: ExchangeWorker) -> torch.futures.Future[Tensor]:
        late = reducer.plan.offer
        if not isinstance(late, Late):
            return average(buffer, self.process_group)
        assert reducer.state is not None
        reducer.state.finish()
        reducer.begin(reducer.state)
        start = on_stream(self._side_stream(buffer.device)) if buffer.is_cuda else on_worker(worker, reducer.explain)
        return reduce_late(late, reducer.state, buffer, reducer.plan.comm, self.process_group, start)

    def _reduce_on_side_stream(self, reducer: "BucketReducer", buffer: Tensor, place: dict[str, bool]) -> torch.futures.Future[Tensor]:
        stream = self._side_stream(buffer.device)
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
        stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(stream):
            self.joiner.reduce(reducer(buffer), reducer.size, reducer.plan.comm, future, **place)
        return future

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        return self.stream

    def _reducer(self, index: int, parameters: Sequence[Tensor], worker: ExchangeWorker, phase: Phase, sparse: bool) -> "BucketReducer":
        current = self.reducers.get(index)
        if current is not None and current.phase == phase and current.serves(parameters):
            return current
        if current is not None:
            # DDP has rebuilt its buckets: every one of them may hold other parameters now. Or the next phase begins.
            self.retired, self.reducers = [*self.retired, *self.reducers.values()], {}
        created = BucketReducer(index, parameters, self, worker, phase, sparse)
        self.reducers[index] = created
        return created

    def _forget_retired(self) -> None:
        for reducer in self.retired:
            self.runtime.reports.remove(reducer.entry)
        self.retired = []


class BucketReducer:
    """Averages one bucket in one phase, with its state.

    ``joined``: whether this rank has no more inputs, so that only others apply the average.
    """

    def __init__(
        self, index: int, parameters: Sequence[Tensor], owner: GradientCompressor, worker: ExchangeWorker, phase: Phase, sparse: bool
    ) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.find_unused, self.process_group = owner.find_unused, owner.process_group
        self.runtime, self.phase, self.group = owner.runtime, phase, worker.group
        self.joined = False
        per_host, unused = ranks_per_host(owner.process_group, phase.config.ranks_per_host), self.find_unused
        plan = BucketPlan.of(parameters, owner.names, self.group, per_host, phase, owner.link, may_be_unused=unused, sparse=sparse)
        self.plan = replace(plan, comm=worker.comm(per_host)) if isinstance(plan.comm, HostsComm) else plan
        self.state = self._find_state(parameters, owner)
        measure = BucketMeasure([self.state]) if self.state is not None else None
        self.entry = self.plan.publish(bucket_name(owner.title, index, owner.process_group), owner.runtime, measure)
        self.entry.owner, self.entry.model = weakref.ref(self), owner.title
        self.size = self._joined_bytes(owner.joiner.limit)

    def __call__(self, buffer: Tensor) -> Suspended:
        """Averages ``buffer`` (1-D, or sparse) over the group, up to the messages that may be joined. Returns it, or a new tensor."""
        if self.plan.sparse:
            return self._reduce_sparse(buffer)
        offer = self.plan.offer
        if self.state is None or offer is None:
            return self.plan.reduce_dense(buffer)
        self.begin(self.state)
        with self.state.skip_unused(buffer, offer.members.compressed) if self.find_unused else nullcontext():
            if not self.size:
                return offer.reduce(buffer, self.state.tensors, self.plan.comm, in_place=True)
            function = partial(offer.steps, buffer, self.state.tensors, in_place=True)
            return (yield from suspended(function, self.plan.comm))

    def begin(self, state: BucketState) -> None:
        """Prepares the bucket's ``state`` for an exchange."""
        self.runtime.begin_exchange(state, self.phase.config, final=self.joined)

    def _reduce_sparse(self, buffer: Tensor) -> Tensor:
        """Averages a sparse gradient as DDP's own reducer does; no functional collective takes one."""
        average = buffer / self.group.size()
        dist.all_reduce(average, group=self.group)
        return average

    def _joined_bytes(self, limit: int) -> int:
        """Returns the bytes of each message if the messages are to be joined with those of other buckets, else 0.

        Those of several groups are not joined.
        """
        offer = self.plan.offer
        traffic = offer.traffic if offer is not None and not isinstance(self.plan.comm, HostsComm) else None
        size = traffic.wire_bytes // traffic.messages if traffic is not None else 0
        return size if size < limit else 0

    def explain(self, error: Exception) -> None:
        """Adds to ``error`` the reason why another rank has left, if there is one."""
        self.runtime.agreement.explain(self.process_group, error)

    def serves(self, parameters: Sequence[Tensor]) -> bool:
        """Returns True if these are the parameters of the bucket, in this order, and no other bucket has taken over the state of one."""
        return refer_to(self.parameters, parameters) and (self.state is None or self.state.holds(self._compressed(parameters)))

    def _compressed(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        assert self.plan.offer is not None
        return [parameters[segment.parameter.position] for segment in self.plan.offer.members.compressed]

    def _find_state(self, parameters: Sequence[Tensor], owner: GradientCompressor) -> BucketState | None:
        offer = self.plan.offer
        return None if offer is None else owner.runtime.states.bucket(self._compressed(parameters), offer.state, "DDP")


def _run(
    joiner: MessageJoiner, reducer: BucketReducer, buffer: Tensor, promise: torch.futures.Future[Tensor], place: dict[str, bool]
) -> None:
    try:
        joiner.reduce(reducer(buffer), reducer.size, reducer.plan.comm, promise, **place)
    except Exception as error:  # the backward that waits for the results raises it
        reducer.explain(error)
        for failed in joiner.drop():
            failed.set_exception(error)  # type: ignore[arg-type]


def _result(done: torch.futures.Future[Tensor]) -> Tensor:
    """Returns the result, or raises the error: DDP takes the error of a callback, but an exception that was set for a tensor."""
    return done.value()
