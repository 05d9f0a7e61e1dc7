"""Averages the gradient buckets of one DDP module: calls the function of a scheme where DDP would call all_reduce.

On CPU the function runs on a worker thread with a process group of its own (``workers.py``). So a bucket never blocks the backward that
fills the next one, and the exchanges of several buckets come in the same order on every rank. On CUDA it runs on a side stream.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.element_order import ElementOrder
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.integrations.ddp_report import averaged_parameters, bucket_name, title_of
from dct_compile.measure import BucketMeasure
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.manager import publish
from dct_compile.passes.plan import Decision, decide, dense
from dct_compile.passes.record import describe_function, describe_site
from dct_compile.posts import Signature
from dct_compile.reasons import Note, Reason, abbreviated
from dct_compile.report import DeferredGraph, GraphReport, Measure, ReportEntry
from dct_compile.runtime import Runtime
from dct_compile.schemes import GradientOffer
from dct_compile.state.bucket import BucketState, refer_to
from dct_compile.state.gradient_use import NO_BACKWARD
from dct_compile.state.store import named_parameters
from dct_compile.workers import ExchangeWorker


@dataclass(frozen=True)
class BucketPlan:
    """The decision about one bucket. ``device``: where its buffer is. ``sparse``: whether that is a sparse tensor."""

    decision: Decision
    comm: Comm
    device: torch.device
    sparse: bool

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor],
        names: dict[int, str],
        group: ProcessGroup,
        config: DCTConfig,
        *,
        may_be_unused: bool,
        sparse: bool,
    ) -> "BucketPlan":
        members = [Parameter(index, names[id(item)], tuple(item.shape), ElementOrder.of(item)) for index, item in enumerate(parameters)]
        exchange = gradient_exchange(ALL_REDUCE, segments_of(members), parameters[0].dtype, group, may_be_unused)
        decision = dense(exchange, Reason.SPARSE) if sparse else decide(exchange, config)
        return cls(decision, Comm(group.group_name, group.size()), parameters[0].device, sparse)

    @property
    def offer(self) -> GradientOffer | None:
        offer = self.decision.offer
        assert offer is None or isinstance(offer, GradientOffer)
        return offer

    def signature(self, reason_to_leave: str | None) -> Signature:
        """Returns the values that the ranks compare. ``reason_to_leave``: the reason to keep DDP's own reducer, if it is kept."""
        exchange = self.decision.exchange
        return Signature(exchange.key(), self.decision.digest if reason_to_leave is None else "dense", exchange.label)

    def reduce(self, grad: Tensor, *state: Tensor) -> Tensor:
        """Averages the buffer ``grad``, with the state in the order of the offer's spec."""
        if self.offer is None:
            return self.reduce_dense(grad)
        names = [tensor.input_name for tensor in self.offer.state.tensors]
        return self.offer.reduce(grad, dict(zip(names, state, strict=True)), self.comm)

    def reduce_dense(self, grad: Tensor) -> Tensor:
        """Averages the buffer ``grad`` uncompressed."""
        return self.comm.wait(self.comm.all_reduce(grad, "avg"))

    def publish(self, name: str, runtime: Runtime, measure: Measure | None) -> ReportEntry:
        """Reports the bucket as a graph of its own."""
        return publish(DeferredGraph(name, partial(self._describe, name)), [(describe_site(self.decision), measure)], runtime)

    def _describe(self, name: str) -> GraphReport:
        """Traces the function of the bucket: dense before, and as it is after the rewriting. A sparse bucket has no such function."""
        if self.sparse:
            return GraphReport(name, "", "")
        exchange = self.decision.exchange
        assert exchange.shape is not None
        # A trace concerns the whole process, so that no other thread may compile meanwhile.
        with compile_lock:
            with FakeTensorMode():
                grad = {"grad": torch.empty(exchange.shape, dtype=exchange.dtype, device=self.device)}
                state = BucketState([], self.offer.state, self.device).tensors if self.offer is not None else {}
            before, nodes_before = describe_function(self.reduce_dense, grad)
            after, nodes_after = describe_function(self.reduce, {**grad, **state})
        return GraphReport(name, before, after, nodes_before, nodes_after)


class GradientCompressor:
    """The communication hook of one DDP module, and a reducer for each of its buckets.

    ``agree``: compares the decisions with those of the other ranks; called once, before the first exchange.
    """

    def __init__(self, module: DistributedDataParallel, config: DCTConfig, runtime: Runtime, agree: Callable[[], None]) -> None:
        self.find_unused = module.find_unused_parameters
        self.config, self.runtime, self.process_group, self.agree = config, runtime, module.process_group, agree
        self.title = title_of(module, runtime)
        self.names = {id(parameter): name for name, parameter in named_parameters(module)}
        # Parameters that no compiled graph was called with; a parameter that was not used at all cannot be told from those.
        self.uncompiled = {} if self.find_unused else {id(parameter): name for name, parameter in averaged_parameters(module)}
        self.worker: ExchangeWorker | None = None
        for handle in runtime.states.use.watch(list(module.parameters())):
            weakref.finalize(module, handle.remove)
        self.stream: torch.cuda.Stream | None = None
        self.reducers: dict[int, BucketReducer] = {}
        self.retired: list[BucketReducer] = []

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Starts the bucket's averaging and returns at once: the hook. Buckets come in the same order on all ranks."""
        buffer = bucket.buffer()
        worker = self.own_worker()
        reducer = self._reducer(bucket.index(), bucket.parameters(), worker.group, buffer.is_sparse)
        if bucket.is_last():
            self._forget_retired()
            self._warn_of_uncompiled()
        # A rank that has no more inputs is called outside of a backward (``torch.distributed.algorithms.Join``).
        reducer.joined = torch._C._current_graph_task_id() == NO_BACKWARD
        if buffer.is_cuda:
            return self._reduce_on_side_stream(reducer, buffer)
        promise: torch.futures.Future[Tensor] = torch.futures.Future()
        worker.submit(partial(_run, reducer, buffer, promise))
        return promise.then(_result)

    def mark_compiled(self, parameters: Sequence[object]) -> None:
        """Remembers that a compiled graph is called with ``parameters``."""
        for parameter in parameters:
            self.uncompiled.pop(id(parameter), None)

    def own_worker(self) -> ExchangeWorker:
        """Returns the worker of the exchanges, found when the first bucket is ready: then all ranks are here."""
        if self.worker is None:
            self.agree()
            self.worker = self.runtime.workers.of(self.process_group)
        return self.worker

    def _warn_of_uncompiled(self) -> None:
        if self.uncompiled:
            self.runtime.warn_once(Note.NOT_COMPILED.format(parameters=abbreviated(list(self.uncompiled.values()))))
            self.uncompiled = {}

    def _reduce_on_side_stream(self, reducer: "BucketReducer", buffer: Tensor) -> torch.futures.Future[Tensor]:
        if self.stream is None:
            self.stream = torch.cuda.Stream(buffer.device)
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
        self.stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self.stream):
            future.set_result(reducer(buffer))
        return future

    def _reducer(self, index: int, parameters: Sequence[Tensor], group: ProcessGroup, sparse: bool) -> "BucketReducer":
        current = self.reducers.get(index)
        if current is not None and current.serves(parameters):
            return current
        if current is not None:
            # DDP has rebuilt its buckets: every one of them may hold other parameters now.
            self.retired, self.reducers = [*self.retired, *self.reducers.values()], {}
        created = BucketReducer(index, parameters, self, group, sparse)
        self.reducers[index] = created
        return created

    def _forget_retired(self) -> None:
        for reducer in self.retired:
            self.runtime.reports.remove(reducer.entry)
        self.retired = []


class BucketReducer:
    """Averages one bucket, with its state. ``joined``: whether this rank has no more inputs, so that only others apply the average."""

    def __init__(self, index: int, parameters: Sequence[Tensor], owner: GradientCompressor, group: ProcessGroup, sparse: bool) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        self.find_unused, self.process_group = owner.find_unused, owner.process_group
        self.runtime, self.config, self.group = owner.runtime, owner.config, group
        self.joined = False
        self.plan = BucketPlan.of(parameters, owner.names, group, owner.config, may_be_unused=self.find_unused, sparse=sparse)
        self.state = self._find_state(parameters, owner)
        measure = BucketMeasure([self.state]) if self.state is not None else None
        self.entry = self.plan.publish(bucket_name(owner.title, index, owner.process_group), owner.runtime, measure)
        self.entry.owner, self.entry.model = weakref.ref(self), owner.title

    def __call__(self, buffer: Tensor) -> Tensor:
        """Returns the average over the group of ``buffer`` (1-D, or sparse), as a new tensor."""
        if self.plan.sparse:
            return self._reduce_sparse(buffer)
        offer = self.plan.offer
        if self.state is None or offer is None:
            return self.plan.reduce_dense(buffer)
        self.runtime.begin_exchange(self.state, self.config, final=self.joined)
        with self.state.skip_unused(buffer, offer.members.compressed) if self.find_unused else nullcontext():
            return offer.reduce(buffer, self.state.tensors, self.plan.comm)

    def _reduce_sparse(self, buffer: Tensor) -> Tensor:
        """Averages a sparse gradient as DDP's own reducer does; no functional collective takes one."""
        average = buffer / self.group.size()
        dist.all_reduce(average, group=self.group)
        return average

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


def _run(reducer: BucketReducer, buffer: Tensor, promise: torch.futures.Future[Tensor]) -> None:
    try:
        with torch.no_grad():
            promise.set_result(reducer(buffer))
    except Exception as error:  # the backward that waits for the result raises it
        reducer.explain(error)
        promise.set_exception(error)  # type: ignore[arg-type]


def _result(done: torch.futures.Future[Tensor]) -> Tensor:
    """Returns the result, or raises the error: DDP takes the error of a callback, but an exception that was set for a tensor."""
    return done.value()
