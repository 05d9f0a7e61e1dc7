"""Runs the graphs of several ranks side by side in one process: what each collective receives is worked out from all ranks' inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dct_compile.passes.graph_utils import WAIT, argument
from dct_compile.state.bucket import BucketState
from tests.tracing import Trace, placeholders, trace

c10d = torch.ops._c10d_functional


def run_in_lockstep(graphs: Sequence[fx.Graph], inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """What the graph of each rank returns. The graphs must be alike but for constants; sizes must be static. Mutates state inputs."""
    interpreters = [fx.Interpreter(fx.GraphModule({}, graph)) for graph in graphs]
    waiting = [iter(values) for values in inputs]
    results: list[list[Any]] = []
    for nodes in zip(*(graph.nodes for graph in graphs), strict=True):
        assert len({(node.op, str(node.target)) for node in nodes}) == 1, f"ranks differ: {nodes}"
        if nodes[0].op == "placeholder":
            values = [next(iterator) for iterator in waiting]
        else:
            arguments = [rank.fetch_args_kwargs_from_env(node) for rank, node in zip(interpreters, nodes, strict=True)]
            values = _call(interpreters, nodes, arguments)
        for rank, node, value in zip(interpreters, nodes, values, strict=True):
            rank.env[node] = value
        if nodes[0].op == "output":
            results = [list(value) for value in values]
    return results


def _call(interpreters: Sequence[fx.Interpreter], nodes: Sequence[fx.Node], arguments: Sequence[tuple[Any, Any]]) -> list[Any]:
    target = nodes[0].target
    if target is WAIT:
        return [args[0] for args, _ in arguments]
    tensors = [args[0] for args, _ in arguments]
    if target is c10d.all_reduce.default:
        return [_reduce(tensors, arguments[0][0][1])] * len(nodes)
    if target is c10d.all_gather_into_tensor.default:
        return [torch.cat(tensors)] * len(nodes)
    if target is c10d.reduce_scatter_tensor.default:
        return list(_reduce(tensors, arguments[0][0][1]).chunk(len(nodes)))
    if target is c10d.all_to_all_single.default:
        sent = [tensor.split(argument(node, "input_split_sizes")) for tensor, node in zip(tensors, nodes, strict=True)]
        received = [torch.cat([pieces[rank] for pieces in sent]) for rank in range(len(nodes))]
        for tensor, node in zip(received, nodes, strict=True):
            assert len(tensor) == sum(argument(node, "output_split_sizes"))
        return received
    return [
        getattr(interpreter, node.op)(node.target, *arguments[rank])
        for rank, (interpreter, node) in enumerate(zip(interpreters, nodes, strict=True))
    ]


def _reduce(tensors: Sequence[Tensor], op: str) -> Tensor:
    total = torch.stack([tensor.float() for tensor in tensors]).sum(0)
    return (total / len(tensors) if op == "avg" else total).to(tensors[0].dtype)


def make_inputs(traced: Trace, rank: int) -> list[Any]:
    """Values for the joint graph's placeholders: parameters alike on all ranks, fresh state, all else random per rank (ids below 8)."""
    nodes = placeholders(traced.before)
    buckets = [BucketState([], item.spec, torch.device("cpu")) for item in traced.requests]
    state = [tensor for bucket in buckets for tensor in bucket.tensors.values()]
    values: list[Any] = []
    for position, node in enumerate(nodes):
        own = 0 if position < len(traced.inputs) and traced.inputs[position].is_parameter else rank + 1
        generator = torch.Generator().manual_seed(1000 * position + own)
        example = node.meta["val"]
        in_state = position - len(traced.inputs)
        if 0 <= in_state < len(state):
            values.append(state[in_state])
        elif example.is_floating_point():
            values.append(torch.randn(example.shape, generator=generator, dtype=example.dtype))
        else:
            values.append(torch.randint(0, 8, example.shape, generator=generator, dtype=example.dtype))
    return values


def trace_all(function: Callable[..., Any], *inputs: Any, ranks: int = 2, **options: Any) -> list[Trace]:
    """The same function traced on every rank."""
    return [trace(function, *inputs, ranks=ranks, rank=rank, **options) for rank in range(ranks)]


def run_both(ranks: list[Trace]) -> tuple[list[list[Any]], list[list[Any]]]:
    """What each rank's joint graph returns before and after the passes."""
    before = run_in_lockstep([item.before for item in ranks], [make_inputs(item, rank) for rank, item in enumerate(ranks)])
    after = run_in_lockstep([item.after for item in ranks], [make_inputs(item, rank) for rank, item in enumerate(ranks)])
    return before, after
