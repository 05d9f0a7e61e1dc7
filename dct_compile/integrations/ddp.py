"""DistributedDataParallel: its reducer sends gradients from C++, outside every graph. A communication hook takes its place.

Each bucket gets a graph of one averaging all_reduce, which the same passes rewrite as any other. On CPU the graph runs on a worker
thread with a process group of its own, so that a bucket never blocks the backward that fills the next one, and buckets are exchanged in
the same order on every rank; on CUDA it runs on a side stream.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, GradBucket, _compute_bucket_assignment_by_size
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from dct_compile.config import DCTConfig
from dct_compile.measure import BucketMeasure
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.manager import publish, record, rewrite
from dct_compile.passes.plan import Decision, plan
from dct_compile.passes.reasons import Note, Reason
from dct_compile.passes.record import describe
from dct_compile.passes.sites import GraphContext, Parameter, Segment, find_sites
from dct_compile.report import GraphReport, Measure, ReportEntry, SiteReport
from dct_compile.runtime import Runtime
from dct_compile.state import STATE_INPUTS, BucketState, named_parameters

_ATTRIBUTE = "_dct_gradient_compressor"
_NAMED = 8
"""Parameters that a note names."""


def enclosing_modules() -> list[DistributedDataParallel]:
    """The DDP modules whose ``forward`` is running now, innermost first: a backend is called inside of them."""
    found: list[DistributedDataParallel] = []
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code is DistributedDataParallel.forward.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


def attach(module: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> None:
    """Lets ``module`` reduce its gradients compressed, from the next backward on. Does nothing the second time.

    Leaves DDP's own reducer in place, and says so in the report, where nothing would be compressed or the user registered a hook.
    """
    if hasattr(module, _ATTRIBUTE):
        return
    reason = _reason_to_leave(module, config)
    if reason is not None:
        setattr(module, _ATTRIBUTE, None)
        _publish_dense(module, reason, runtime)
        return
    runtime.agreement.check(module.process_group, config, [])
    compressor = GradientCompressor(module, config, runtime)
    setattr(module, _ATTRIBUTE, compressor)
    module.register_comm_hook(compressor, GradientCompressor.reduce)


def watched(
    compiled: Callable[..., Any], modules: Sequence[DistributedDataParallel], parameter_positions: Sequence[int]
) -> Callable[..., Any]:
    """``compiled``, telling the compressors of ``modules`` the parameters that it is called with, until their first backward is over."""
    compressors = [found for module in modules if (found := getattr(module, _ATTRIBUTE)) is not None]
    if not compressors:
        return compiled

    def run(*args: Any) -> Any:
        for compressor in compressors:
            if compressor.uncompiled:
                compressor.mark_compiled([args[position] for position in parameter_positions])
        return compiled(*args)

    return run


def foresee(module: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> None:
    """Reports what :func:`attach` will come to, and attaches nothing.

    The buckets are those that DDP will have from its second step on if gradients come in the reverse order of the parameters; what it
    sends does not depend on how parameters are bucketed.
    """
    reason = _reason_to_leave(module, config)
    if reason is not None:
        _publish_dense(module, reason, runtime)
        return
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    for index, parameters in enumerate(_future_buckets(module)):
        first = parameters[0]
        with FakeTensorMode():
            buffer = torch.empty(sum(parameter.numel() for parameter in parameters), dtype=first.dtype, device=first.device)
        graph, context = _trace(parameters, names, buffer, module.process_group)
        own = _own_config(module, config)
        decisions = plan(find_sites(graph, context), own, training=True)
        _rewrite(index, graph, decisions, first.device, module.process_group, own, runtime, None)


@contextmanager
def at_rest(modules: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """While it lasts, the modules' ``forward`` neither sends buffers nor prepares the reducer for a backward."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.no_sync())
            stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
            module.require_forward_param_sync = False
        yield


def _future_buckets(module: DistributedDataParallel) -> list[list[Tensor]]:
    parameters, sparse = module._build_params_for_reducer()
    parameters.reverse()
    first = [_DEFAULT_FIRST_BUCKET_BYTES] if module.bucket_bytes_cap_default else []
    limits = getattr(module, "bucket_bytes_cap_list", []) or [*first, module.bucket_bytes_cap]
    buckets, _ = _compute_bucket_assignment_by_size(parameters, limits, sparse[::-1])
    return [[parameters[position] for position in bucket] for bucket in buckets]


def _own_config(module: DistributedDataParallel, config: DCTConfig) -> DCTConfig:
    """A parameter that no rank used keeps its gradient as it is, so nothing may be sent for it: only a rank can know, not an owner."""
    return replace(config, all_reduce="gather") if module.find_unused_parameters else config


def _reason_to_leave(module: DistributedDataParallel, config: DCTConfig) -> str | None:
    if module.process_group.size() == 1:
        return Reason.ONE_RANK
    if config.dp_density == 1:
        return Reason.DP_DENSITY_ONE
    if any(hook is not GradientCompressor.reduce for hook, _ in getattr(module, "_comm_hooks", [])):
        return Reason.OWN_HOOK
    if getattr(module, "_use_python_reducer", False):
        return Reason.PYTHON_REDUCER
    return None


def _publish_dense(module: DistributedDataParallel, reason: str, runtime: Runtime) -> None:
    """Reports that ``module`` keeps DDP's own reducer."""
    publish(GraphReport("DistributedDataParallel", "", ""), [(_dense_site(module, reason), None)], runtime)


def _dense_site(module: DistributedDataParallel, reason: str) -> SiteReport:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    numel = sum(parameter.numel() for parameter in parameters)
    size = module.process_group.size()
    sent = 2 * (size - 1) * sum(parameter.numel() * parameter.itemsize for parameter in parameters) // size
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    group = module.process_group.group_name
    return SiteReport("all_reduce", "gradient", "all of DDP's parameters", (numel,), dtype, "dense", str(reason), sent, sent, group, size)


class GradientCompressor:
    """The communication hook of one DDP module and what it has compiled for each bucket."""

    def __init__(self, module: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> None:
        self.find_unused = module.find_unused_parameters
        self.config = _own_config(module, config)
        self.runtime = runtime
        self.names = {id(parameter): name for name, parameter in named_parameters(module)}
        # Parameters that no compiled graph was called with; a parameter that was not used at all cannot be told from those.
        self.uncompiled = {} if self.find_unused else {id(p): self.names[id(p)] for p in module.parameters() if p.requires_grad}
        ranks = dist.get_process_group_ranks(module.process_group)
        self.group = dist.new_group(ranks, backend=dist.get_backend(module.process_group), use_local_synchronization=True)
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dct-reducer")
        weakref.finalize(module, self.worker.shutdown, wait=False)
        self.stream: torch.cuda.Stream | None = None
        self.reducers: dict[int, BucketReducer] = {}
        self.retired: list[BucketReducer] = []

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The hook: starts the bucket's averaging and returns at once. Buckets come in the same order on all ranks."""
        buffer = bucket.buffer()
        reducer = self._reducer(bucket.index(), bucket.parameters(), buffer)
        if bucket.is_last():
            self._forget_retired()
            self._tell_uncompiled()
        if buffer.is_cuda:
            return self._reduce_on_side_stream(reducer, buffer)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        self.worker.submit(_run, reducer, buffer, future)
        return future

    def mark_compiled(self, parameters: Sequence[Tensor]) -> None:
        """A compiled graph is called with ``parameters``."""
        for parameter in parameters:
            self.uncompiled.pop(id(parameter), None)

    def _tell_uncompiled(self) -> None:
        if self.uncompiled:
            names = list(self.uncompiled.values())
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            self.runtime.tell(Note.NOT_COMPILED.format(parameters=", ".join(names[:_NAMED]) + more))
            self.uncompiled = {}

    def _reduce_on_side_stream(self, reducer: "BucketReducer", buffer: Tensor) -> torch.futures.Future[Tensor]:
        if self.stream is None:
            self.stream = torch.cuda.Stream(buffer.device)
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
        self.stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self.stream):
            future.set_result(reducer(buffer))
        return future

    def _reducer(self, index: int, parameters: Sequence[Tensor], buffer: Tensor) -> "BucketReducer":
        current = self.reducers.get(index)
        if current is not None and current.serves(parameters):
            return current
        if current is not None:
            # DDP has rebuilt its buckets: every one of them may hold other parameters now.
            self.retired, self.reducers = list(self.reducers.values()), {}
        created = BucketReducer(index, parameters, buffer, self)
        self.reducers[index] = created
        return created

    def _forget_retired(self) -> None:
        kept = [reducer.state for reducer in self.reducers.values()]
        self.runtime.states.retire([reducer.state for reducer in self.retired if reducer.state is not None and reducer.state not in kept])
        for reducer in self.retired:
            self.runtime.reports.remove(reducer.entry)
        self.retired = []


class BucketReducer:
    """The rewritten graph of one bucket, with its state."""

    def __init__(self, index: int, parameters: Sequence[Tensor], buffer: Tensor, owner: GradientCompressor) -> None:
        self.parameters = [weakref.ref(parameter) for parameter in parameters]
        graph, context = _trace(parameters, owner.names, buffer, owner.group)
        decisions = plan(find_sites(graph, context), owner.config, training=True)
        self.state = self._find_state(decisions, parameters, owner)
        measure = None if self.state is None else BucketMeasure([self.state])
        self.entry = _rewrite(index, graph, decisions, buffer.device, owner.group, owner.config, owner.runtime, measure)
        self.module = fx.GraphModule(nn.Module(), graph)
        self.find_unused = owner.find_unused

    def __call__(self, buffer: Tensor) -> Tensor:
        """The average over the group of ``buffer`` (1-D), as a new tensor."""
        if self.state is None:
            return self._reduce(buffer)
        if not self.find_unused:
            return self._reduce(buffer, *self.state.tensors())
        with self.state.holding_unused(buffer):
            return self._reduce(buffer, *self.state.tensors())

    def _reduce(self, *inputs: Tensor) -> Tensor:
        result = self.module(*inputs)
        assert isinstance(result, Tensor)
        return result

    def serves(self, parameters: Sequence[Tensor]) -> bool:
        return len(parameters) == len(self.parameters) and all(
            ref() is parameter for ref, parameter in zip(self.parameters, parameters, strict=True)
        )

    @staticmethod
    def _find_state(decisions: Sequence[Decision], parameters: Sequence[Tensor], owner: GradientCompressor) -> BucketState | None:
        for decision in decisions:
            if decision.gradient is not None:
                members = [parameters[segment.parameter.position] for segment in decision.gradient.compressed]
                state = owner.runtime.states.bucket(members, decision.gradient.layout, decision.gradient.owner_layout)
                retired = [reducer.state for reducer in owner.retired if reducer.state is not None and reducer.state is not state]
                owner.runtime.states.move(retired, state)
                return state
        return None


def _run(reducer: BucketReducer, buffer: Tensor, future: torch.futures.Future[Tensor]) -> None:
    try:
        with torch.no_grad():
            future.set_result(reducer(buffer))
    except Exception as error:  # the backward that waits for the future raises it
        future.set_exception(error)  # type: ignore[arg-type]


def _rewrite(
    index: int,
    graph: fx.Graph,
    decisions: Sequence[Decision],
    device: torch.device,
    group: dist.ProcessGroup,
    config: DCTConfig,
    runtime: Runtime,
    measure: Measure | None,
) -> ReportEntry:
    """Rewrites a bucket's graph in place and reports it."""
    before = describe(graph, decisions)
    rewrite(graph, decisions, lambda decision: _add_state_inputs(graph, decision, device), config)
    return record(f"DDP bucket {index} of group {group.group_name}", before, graph, runtime, [measure])


def _trace(parameters: Sequence[Tensor], names: dict[int, str], buffer: Tensor, group: dist.ProcessGroup) -> tuple[fx.Graph, GraphContext]:
    """The graph of what DDP does with a bucket: one averaging all_reduce. Of ``buffer`` only shape, dtype and device count."""
    module = fx.GraphModule(nn.Module(), fx.Graph())
    graph = module.graph
    gradient = graph.placeholder("grad")
    output = graph.output(gradient)
    with FakeTensorMode():
        gradient.meta["val"] = torch.empty(buffer.shape, dtype=buffer.dtype, device=buffer.device)
    at = gu.Inserter(graph, output, gradient)
    started = at.call(gu.c10d.all_reduce.default, gradient, "avg", group.group_name)
    output.args = (at.call(gu.WAIT, started),)
    segments: list[Segment] = []
    offset = 0
    for position, parameter in enumerate(parameters):
        segments.append(Segment(Parameter(position, names[id(parameter)], parameter.numel()), offset))
        offset += parameter.numel()
    return graph, GraphContext(training=True, segments={started: tuple(segments)})


def _add_state_inputs(graph: fx.Graph, decision: Decision, device: torch.device) -> list[fx.Node]:
    """Placeholders for the state of ``decision``, behind the gradient's."""
    assert decision.gradient is not None
    last = next(node for node in graph.nodes if node.op == "placeholder")
    with last.meta["val"].fake_mode:
        examples = BucketState([], decision.gradient.layout, decision.gradient.owner_layout, device).tensors()
    added: list[fx.Node] = []
    for name, example in zip(STATE_INPUTS, examples, strict=False):
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        last.meta["val"] = example
        added.append(last)
    return added
