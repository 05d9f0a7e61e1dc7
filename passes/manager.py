"""Runs the passes over one graph and reports what they did."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import PlainAOTInput
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import trace_structured
from torch.distributed import ProcessGroup

from dct_compile.config import DCTConfig
from dct_compile.measure import BucketMeasure
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.compress_activations import compress_activations
from dct_compile.passes.compress_gradients import compress_gradients
from dct_compile.passes.insert_gradient_sync import gradient_buckets, insert_gradient_sync
from dct_compile.passes.plan import Decision, plan
from dct_compile.passes.record import Described, describe, describe_nodes, readable
from dct_compile.passes.sites import GraphContext, Parameter, find_sites
from dct_compile.report import GraphReport, Measure, ReportEntry, SiteReport
from dct_compile.runtime import Runtime
from dct_compile.state import BucketState
from dct_compile.triton_kernels.layout import GradientLayout

log = logging.getLogger("dct_compile.passes")


@dataclass(frozen=True)
class GraphInput:
    """One input of a Dynamo graph: name, dtype (of a tensor), and whether it is a parameter, trainable, or another part's result."""

    name: str
    dtype: torch.dtype | None
    is_parameter: bool
    is_trainable: bool
    is_foreign: bool


@dataclass
class StateRequest:
    """The state that one gradient site needs: of which inputs, in which geometry. ``buckets`` are the states that it has run with."""

    positions: tuple[int, ...]
    layout: GradientLayout
    owner_layout: GradientLayout | None
    buckets: list[BucketState] = field(default_factory=list)

    @classmethod
    def of(cls, decision: Decision) -> "StateRequest":
        assert decision.gradient is not None
        positions = tuple(segment.parameter.position for segment in decision.gradient.compressed)
        return cls(positions, decision.gradient.layout, decision.gradient.owner_layout)

    def matches(self, other: "StateRequest") -> bool:
        return (self.positions, self.layout, self.owner_layout) == (other.positions, other.layout, other.owner_layout)

    @property
    def tensor_count(self) -> int:
        return 3 if self.owner_layout is None else 6


class StateNeededError(Exception):
    """The graph has gradient sites whose state is not among its inputs: trace it again with these."""

    def __init__(self, requests: list[StateRequest]) -> None:
        super().__init__(f"{len(requests)} gradient sites need state inputs")
        self.requests = requests


class JointGraphPass(CustomGraphPass):
    """Inductor's hook for one Dynamo graph: sees the joint forward and backward graph (or the forward alone, in evaluation).

    ``requests`` are the state inputs appended to ``inputs``, in order. Raises :class:`StateNeededError` when the graph needs others.
    """

    def __init__(
        self,
        name: str,
        config: DCTConfig,
        inputs: Sequence[GraphInput],
        requests: Sequence[StateRequest],
        group: ProcessGroup | None,
        runtime: Runtime,
        earlier: Sequence[Callable[[fx.Graph], None]],
        backward_only: bool = False,
    ) -> None:
        self.name, self.config, self.inputs, self.requests, self.group = name, config, inputs, requests, group
        self.runtime, self.earlier, self.backward_only = runtime, earlier, backward_only
        self.decisions: list[Decision] = []
        self.trains = False
        """Whether the graph, when it was last seen, returned the gradient of a parameter."""

    def uuid(self) -> str:
        """Covers the options; the rewritten graph itself is part of Inductor's cache key anyway."""
        return hashlib.sha256(json.dumps(self.config.comparable(), sort_keys=True).encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        self.runtime.reports.called = True
        for user_pass in self.earlier:
            user_pass(graph)
        context, state = self._read_inputs(graph)
        self.trains = bool(context.gradients)
        if self.group is not None and context.training:
            insert_gradient_sync(graph, context, trainable_buckets(self.inputs, context.parameters.values()), self.group.group_name)
        self.decisions = plan(find_sites(graph, context), self.config, context.training)
        self._check_state(state)
        # Describing a large graph takes a while: one without collectives is neither rewritten nor reported.
        if self.decisions:
            before = describe(graph, self.decisions)
            rewrite(graph, self.decisions, lambda decision: state[self._request_of(decision)], self.config)
            record(self.name, before, graph, self.runtime, self._measures())

    def _read_inputs(self, graph: fx.Graph) -> tuple[GraphContext, dict[int, list[fx.Node]]]:
        """What AOTAutograd's descriptors say: which placeholder is which Dynamo input, which output is whose gradient.

        A tensor subclass is several placeholders; DTensor's local tensor is the one that counts.
        """
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        tangents = [node for node in placeholders if node.name.startswith("tangents")]
        context = GraphContext(training=bool(tangents), tangents=tangents, backward_only=self.backward_only)
        state_nodes: list[fx.Node] = []
        for node in placeholders:
            position = _input_position(node.meta.get("desc"))
            if position is None:
                continue
            if position >= len(self.inputs):
                state_nodes.append(node)
                continue
            info, tensor = self.inputs[position], gu.value(node)
            if info.is_parameter and tensor is not None:
                context.parameters[node] = Parameter(position, info.name, gu.numel_hint(tensor))
            if info.is_foreign:
                context.foreign.add(node)
        known = {parameter.position: parameter for parameter in context.parameters.values()}
        output = gu.output_node(graph)
        for place, (result, descriptor) in enumerate(zip(output.args[0], output.meta.get("desc", ()), strict=False)):  # type: ignore[arg-type]
            position = _input_position(getattr(_innermost(descriptor), "grad_of", None))
            if position in known and self.inputs[position].is_trainable and isinstance(result, fx.Node) and gu.value(result) is not None:
                context.gradients[place] = known[position]
        if self.group is not None and len(set(context.gradients.values())) < len(context.gradients):
            raise RuntimeError(f"{self.name}: a parameter is a subclass of several tensors; data_parallel cannot average its gradient")
        state: dict[int, list[fx.Node]] = {}
        for index, request in enumerate(self.requests):
            state[index], state_nodes = state_nodes[: request.tensor_count], state_nodes[request.tensor_count :]
        return context, state

    def _request_of(self, decision: Decision) -> int:
        wanted = StateRequest.of(decision)
        return next((index for index, request in enumerate(self.requests) if request.matches(wanted)), -1)

    def _check_state(self, state: dict[int, list[fx.Node]]) -> None:
        chosen = [decision for decision in self.decisions if decision.codec == "gradient"]
        if any(self._request_of(decision) < 0 for decision in chosen):
            raise StateNeededError([StateRequest.of(decision) for decision in chosen])

    def _measures(self) -> list[Measure | None]:
        return [
            BucketMeasure(self.requests[self._request_of(decision)].buckets) if decision.codec == "gradient" else None
            for decision in self.decisions
        ]


def _innermost(descriptor: object) -> object:
    """Strips the descriptors of a subclass's parts down to that of the whole."""
    while hasattr(descriptor, "base"):
        descriptor = descriptor.base
    return descriptor


def _input_position(descriptor: object) -> int | None:
    innermost = _innermost(descriptor)
    return innermost.idx if isinstance(innermost, PlainAOTInput) else None


def trainable_buckets(inputs: Sequence[GraphInput], parameters: Iterable[Parameter]) -> list[tuple[Parameter, ...]]:
    """The buckets of a graph's trainable parameters, in which their gradients are averaged."""
    dtypes = [(parameter, inputs[parameter.position].dtype) for parameter in parameters if inputs[parameter.position].is_trainable]
    return gradient_buckets([(parameter, dtype) for parameter, dtype in dtypes if dtype is not None])


def rewrite(graph: fx.Graph, decisions: Sequence[Decision], state: Callable[[Decision], Sequence[fx.Node]], config: DCTConfig) -> int:
    """Executes the decisions. Activations first: their rewriting looks at forward and backward collectives that gradients do not touch."""
    rewritten = compress_activations(graph, decisions, config)
    rewritten += compress_gradients(graph, decisions, state, config)
    graph.lint()
    return rewritten


def record(name: str, before: Described, graph: fx.Graph, runtime: Runtime, measures: Sequence[Measure | None]) -> ReportEntry:
    """Logs the decisions, adds them to the report and to TORCH_TRACE; returns the report's entry."""
    graph_report = GraphReport(name, before.text, readable(graph), before.nodes, describe_nodes(graph))
    return publish(graph_report, list(zip(before.sites, measures, strict=True)), runtime)


def publish(graph: GraphReport, sites: Sequence[tuple[SiteReport, Measure | None]], runtime: Runtime) -> ReportEntry:
    """Tells the log (a line per site), TORCH_TRACE (graphs as text, sites as JSON) and the report what was decided."""
    for site, _ in sites:
        log.info("%s", _log_line(graph.name, site))
    for label, text in (("before", graph.before), ("after", graph.after)):
        if text:  # what DDP's own reducer goes on doing has no graph
            _trace_artifact(f"dct_{label}", "string", text)
    _trace_artifact("dct_sites", "json", [asdict(site) for site, _ in sites])
    return runtime.reports.add(graph, sites)


def _log_line(graph: str, site: SiteReport) -> str:
    sent = f"{site.dense_bytes} -> {site.wire_bytes} bytes"
    return f"{graph}: {site.name}: {site.kind} {site.collective}: {site.decision} ({site.reason}), {sent}"


def _trace_artifact(name: str, encoding: str, payload: object) -> None:
    """An artifact for tlparse. A bucket of DDP belongs to no compilation, so a compilation's id is not expected."""
    trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=lambda: payload, expect_trace_id=False)
