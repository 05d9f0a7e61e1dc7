"""Gives a Dynamo graph the state of its gradient sites as further inputs, and a compiled graph the tensors for them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.distributed import ProcessGroup

from dct_compile.passes import graph_utils as gu
from dct_compile.passes.manager import StateRequest
from dct_compile.runtime import Runtime
from dct_compile.state import BucketState
from dct_compile.state_store import local_tensor

Compiled = Callable[..., Any]


def add_state_inputs(gm: fx.GraphModule, inputs: Sequence[Any], requests: Sequence[StateRequest]) -> tuple[fx.GraphModule, list[Any]]:
    """Returns a copy of a Dynamo graph with placeholders for the state of ``requests`` behind its own, and example inputs to match.

    Dynamo goes on using its own graph, so that one is not touched.
    """
    if not requests:
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
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    copy._param_name_to_source = gm._param_name_to_source
    with detect_fake_mode(list(inputs)) or nullcontext():
        return copy, [*inputs, *(tensor for request in requests for tensor in blank_state(request, inputs))]


def blank_state(request: StateRequest, inputs: Sequence[Any]) -> list[Tensor]:
    """Returns tensors of the shapes that ``request`` wants, for a graph that is called with ``inputs``."""
    return list(BucketState([], request.spec, inputs[request.positions[0]].device).tensors.values())


def with_state(compiled: Compiled, requests: Sequence[StateRequest], runtime: Runtime) -> Compiled:
    """Appends the state of the parameters that a call is made with: one compiled graph may serve several layers."""

    def run(*args: Any) -> Any:
        state: list[Tensor] = []
        for request in requests:
            bucket = runtime.states.bucket([args[position] for position in request.positions], request.spec)
            if bucket not in request.buckets:
                request.buckets.append(bucket)
            state.extend(bucket.tensors.values())
        return compiled(*args, *state)

    return run


def with_equal_start(compiled: Compiled, positions: Sequence[int], group: ProcessGroup, runtime: Runtime) -> Compiled:
    """Makes parameters equal on all ranks of ``group`` before they are used for the first time, as DDP does."""

    def run(*args: Any) -> Any:
        for parameter in (args[position] for position in positions):
            if parameter not in runtime.synchronised:
                runtime.synchronised[parameter] = True
                with torch.no_grad():
                    dist.broadcast(local_tensor(parameter), group=group, group_src=0)
        return compiled(*args)

    return run
