"""Runs the passes over one graph and reports what they did."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import trace_structured
from torch.distributed import ProcessGroup

from dct_compile.buckets import BUCKET_BYTES
from dct_compile.config import DCTConfig
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.link import Link
from dct_compile.measure import BucketMeasure
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.context import has_descriptors, read_context
from dct_compile.passes.decision import Decision, held_until
from dct_compile.passes.graph_input import GraphInput
from dct_compile.passes.graph_utils import resolve_group
from dct_compile.passes.insert_gradient_sync import averaged_buckets, insert_gradient_sync
from dct_compile.passes.plan import decide_in_graph, matching_rows, plan
from dct_compile.passes.record import Described, describe, describe_nodes, readable
from dct_compile.passes.rewrite import rewrite
from dct_compile.passes.sites import GraphContext, find_sites
from dct_compile.passes.subgraphs import subgraph_sites
from dct_compile.report import DeferredGraph, GraphReport, Measure, ReportEntry, SiteReport
from dct_compile.runtime import Runtime
from dct_compile.schemes import GradientOffer
from dct_compile.state.bucket import BucketState
from dct_compile.state.spec import StateSpec

log = logging.getLogger("dct_compile.passes")


@dataclass
class StateRequest:
    """The state that one gradient site needs: of the parameters at ``positions``. ``buckets`` are the states that it has run with."""

    positions: tuple[int, ...]
    spec: StateSpec
    buckets: list[BucketState] = field(default_factory=list)

    @classmethod
    def of(cls, offer: GradientOffer) -> "StateRequest":
        return cls(tuple(segment.parameter.position for segment in offer.members.compressed), offer.state)

    def matches(self, other: "StateRequest") -> bool:
        return (self.positions, self.spec) == (other.positions, other.spec)

    @property
    def names(self) -> list[str]:
        """The names of the graph inputs."""
        return [tensor.input_name for tensor in self.spec.tensors]


class StateNeededError(Exception):
    """The graph has gradient sites whose state is not among its inputs. It must be traced again with ``requests``."""

    def __init__(self, requests: list[StateRequest]) -> None:
        super().__init__(f"{len(requests)} gradient sites need state inputs")
        self.requests = requests


class JointGraphPass(CustomGraphPass):
    """Inductor's hook for one Dynamo graph: gets the joint forward and backward graph (or the forward alone, in evaluation).

    ``requests`` are the state inputs appended to ``inputs``, in order. A call raises :class:`StateNeededError` when the graph needs others.
    ``until``: the exchange at which another phase of the training follows, if one does. ``bucket_bytes``: of ``averaged_buckets``.
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
        until: int | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.name, self.config, self.inputs, self.requests, self.group = name, config, inputs, requests, group
        self.runtime, self.earlier, self.backward_only, self.until = runtime, earlier, backward_only, until
        self.bucket_bytes = bucket_bytes
        self.decisions: list[Decision] = []
        self.trains = False
        """True if the graph, in the last call, returned the gradient of a parameter."""
        self.training = False
        """True if the graph, in the last call, had a backward."""
        self.reduced: set[int] = set()
        """The positions of parameters whose gradients DTensor reduces, known once the graph has been traced."""
        self.entry: ReportEntry | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> "JointGraphPass":
        """Returns itself: torch copies Inductor's configuration while it traces a scan, and this holds what cannot be copied."""
        return self

    def uuid(self) -> str:
        """Returns a hash of the options. The rewritten graph itself is part of Inductor's cache key anyway."""
        return hashlib.sha256(json.dumps(self.config.comparable(), sort_keys=True).encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        self.runtime.reports.called = True
        for user_pass in self.earlier:
            user_pass(graph)
        if not has_descriptors(graph):
            return  # Inductor calls this for the subgraphs of a higher-order operator too. The graph that holds them reports them.
        context, state = self._read_inputs(graph)
        self.trains, self.training = bool(context.gradients), context.training
        if self.group is not None and context.training:
            parameters = [parameter for parameter in context.parameters.values() if parameter.position not in self.reduced]
            insert_gradient_sync(graph, context, averaged_buckets(self.inputs, parameters, self.bucket_bytes), self.group)
        sites = [*find_sites(graph, context), *subgraph_sites(graph, context)]
        link_of = partial(link_between, self.runtime, self.config)
        self.decisions = [held_until(decision, self.until) for decision in plan(sites, self.config, context.training, link_of)]
        self.runtime.reports.patterns.look(self.config, rows=matching_rows(self.decisions, self.config))
        self._check_state()
        # Describing a large graph takes a while: one without collectives is neither rewritten nor reported.
        if self.decisions:
            before = describe(graph, self.decisions)
            rewrite(graph, self.decisions, lambda decision: state[self._request_of(decision)])
            self.entry = record(self.name, before, graph, self.runtime, self._measures())
            self.entry.training = context.training or self.backward_only

    def _read_inputs(self, graph: fx.Graph) -> tuple[GraphContext, dict[int, dict[str, fx.Node]]]:
        """Returns the context of the graph, and the placeholders of each request's state by name."""
        context, state_nodes = read_context(graph, self.inputs, self.backward_only)
        if self.group is not None and len(set(context.gradients.values())) < len(context.gradients):
            raise RuntimeError(f"{self.name}: a parameter is a subclass of several tensors; data_parallel cannot average its gradient")
        nodes = iter(state_nodes)
        return context, {index: dict(zip(request.names, nodes, strict=False)) for index, request in enumerate(self.requests)}

    def _request_of(self, decision: Decision) -> int:
        """Returns the number of the request that asks for the state of ``decision``; -1 where there is none."""
        assert isinstance(decision.offer, GradientOffer)
        wanted = StateRequest.of(decision.offer)
        return next((index for index, request in enumerate(self.requests) if request.matches(wanted)), -1)

    def _check_state(self) -> None:
        """Raises :class:`StateNeededError` unless the graph has exactly the state that its sites need."""
        chosen = [decision for decision in self.decisions if isinstance(decision.offer, GradientOffer)]
        if sorted(self._request_of(decision) for decision in chosen) != list(range(len(self.requests))):
            raise StateNeededError([StateRequest.of(decision.offer) for decision in chosen if isinstance(decision.offer, GradientOffer)])

    def _measures(self) -> list[Measure | None]:
        return [
            BucketMeasure(self.requests[self._request_of(decision)].buckets) if isinstance(decision.offer, GradientOffer) else None
            for decision in self.decisions
        ]


def link_between(runtime: Runtime, config: DCTConfig, group_name: str) -> Link | None:
    """Returns the link of the group of that name, as the options say it; "auto" may wait for its ranks.

    The devices of one process, whose name is empty, have the link that the options assume, or none.
    """
    if not group_name:
        return config.link.on("cuda") if isinstance(config.link, Link) else None
    return runtime.links.of(resolve_group(group_name), config.link)


def expected_requests(
    inputs: Sequence[GraphInput], group: ProcessGroup | None, config: DCTConfig, runtime: Runtime, bucket_bytes: int = BUCKET_BYTES
) -> list[StateRequest]:
    """Returns the state that ``data_parallel`` will need, before the graph is traced: its buckets follow from the parameters alone.

    The state differs if the graph does not return the gradient of a parameter, or if DTensor reduces it. Then the graph is traced a second
    time.
    """
    if group is None:
        return []
    parameters = [Parameter(position, info.name, info.shape) for position, info in enumerate(inputs) if info.is_trainable]
    requests: list[StateRequest] = []
    for bucket in averaged_buckets(inputs, parameters, bucket_bytes):
        dtype = inputs[bucket[0].position].dtype
        assert dtype is not None
        exchange = gradient_exchange(ALL_REDUCE, segments_of(bucket), dtype, group)
        offer = decide_in_graph(exchange, config, partial(link_between, runtime, config)).offer
        if isinstance(offer, GradientOffer):
            requests.append(StateRequest.of(offer))
    return requests


def record(name: str, before: Described, graph: fx.Graph, runtime: Runtime, measures: Sequence[Measure | None]) -> ReportEntry:
    """Logs the decisions and adds them to the report and to TORCH_TRACE.

    Args:
        name: The name of the graph.
        before: The graph and its sites before the rewriting.
        graph: The rewritten graph.
        runtime: The owner of the report.
        measures: One per site, ``None`` for a site without counters.
    """
    graph_report = GraphReport(name, before.text, readable(graph), before.nodes, describe_nodes(graph))
    return publish(graph_report, list(zip(before.sites, measures, strict=True)), runtime)


def publish(graph: GraphReport | DeferredGraph, sites: Sequence[tuple[SiteReport, Measure | None]], runtime: Runtime) -> ReportEntry:
    """Adds decisions to the log (a line per site), to TORCH_TRACE (graphs as text, sites as JSON) and to the report."""
    for site, _ in sites:
        log.info("%s", _log_line(graph.name, site))
    entry = runtime.reports.add(graph, sites)
    if isinstance(graph, DeferredGraph) or graph.before:  # what DDP's own reducer goes on doing has no graph
        _trace_artifact("dct_before", "string", lambda: entry.described().before)
        _trace_artifact("dct_after", "string", lambda: entry.described().after)
    _trace_artifact("dct_sites", "json", lambda: [asdict(site) for site, _ in sites])
    return entry


def _log_line(graph: str, site: SiteReport) -> str:
    sent = f"{site.dense_bytes} -> {site.wire_bytes} bytes"
    return f"{graph}: {site.name}: {site.kind} {site.collective}: {site.decision} ({site.reason}), {sent}"


def _trace_artifact(name: str, encoding: str, payload: Callable[[], object]) -> None:
    """Writes an artifact for tlparse. A bucket of DDP belongs to no compilation, so a compilation's id is not expected."""
    trace_structured("artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload, expect_trace_id=False)
