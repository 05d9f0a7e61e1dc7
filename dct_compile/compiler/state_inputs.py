"""Gives a Dynamo graph the state of its gradient sites as further inputs, and a compiled graph the tensors for them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode

from dct_compile.compiler.exchanges import begin_exchanges
from dct_compile.config import DCTConfig
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.manager import StateRequest
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import BucketState

Compiled = Callable[..., Any]


def add_state_inputs(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    requests: Sequence[StateRequest],
    watchers: Mapping[int, Callable[[Any], Any]] = MappingProxyType({}),
    *,
    always_copied: bool = False,
) -> tuple[fx.GraphModule, list[Any]]:
    """Returns a copy of a Dynamo graph with placeholders for the state of ``requests`` behind its own, and example inputs to match.

    Dynamo goes on using its own graph, so that one is not touched.

    Args:
        gm: The graph.
        inputs: Its example inputs.
        requests: The state that it needs.
        watchers: Functions that are called, and return their argument, when the graph is traced: by position of that input.
        always_copied: Whether it is a copy even where nothing is added: Inductor changes a graph before tracing it.
    """
    if not requests and not watchers and not always_copied:
        return gm, list(inputs)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    last_placeholder = gu.placeholders(gm.graph)[-1]
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copies[node]._dynamo_source = node._dynamo_source
        if node is last_placeholder:
            for index, request in enumerate(requests):
                for name in request.names:
                    added = graph.placeholder(f"dct_{name}_{index}")
                    added._dynamo_source = None
                    added.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            for position, watch in watchers.items():
                watched = gu.placeholders(gm.graph)[position]
                copies[watched] = graph.call_function(watch, (copies[watched],))
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    copy._param_name_to_source = gm._param_name_to_source
    with detect_fake_mode(list(inputs)) or nullcontext():
        return copy, [*inputs, *(tensor for request in requests for tensor in blank_state(request, inputs))]


def blank_state(request: StateRequest, inputs: Sequence[Any]) -> list[Tensor]:
    """Returns tensors of the shapes that ``request`` wants, for a graph that is called with ``inputs``."""
    return list(BucketState([], request.spec, inputs[request.positions[0]].device).tensors.values())


def with_state(
    compiled: Compiled, requests: Sequence[StateRequest], runtime: Runtime, family: str, exchanges: DCTConfig | None = None
) -> Compiled:
    """Appends the state of the parameters that a call is made with: one compiled graph may serve several layers.

    Args:
        compiled: The compiled graph, with inputs for its state.
        requests: The state that it needs.
        runtime: The owner of the states.
        family: The name that all compilations of this code share. Their buckets differ where other parameters are trained.
        exchanges: The options, where the graph itself exchanges gradients; ``None`` where a backward does so later.
    """

    def run(*args: Any) -> Any:
        buckets: list[BucketState] = []
        for request in requests:
            bucket = runtime.states.bucket([args[position] for position in request.positions], request.spec, family)
            if bucket not in request.buckets:
                request.buckets[:] = [*(held for held in request.buckets if held.lives), bucket]
            buckets.append(bucket)
        if exchanges is not None:
            begin_exchanges(buckets, exchanges, runtime)
        return compiled(*args, *(tensor for bucket in buckets for tensor in bucket.tensors.values()))

    return run
