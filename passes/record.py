"""What a report shows of a graph and of the decisions about it, as plain values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dct_compile.passes import graph_utils as gu
from dct_compile.passes.decision import Decision
from dct_compile.passes.source import source_line
from dct_compile.passes.splice import trace
from dct_compile.report import NodeReport, SiteReport


@dataclass(frozen=True)
class Described:
    """A graph and its sites before the rewriting: readable code, nodes, sites."""

    text: str
    nodes: tuple[NodeReport, ...]
    sites: list[SiteReport]


def describe(graph: fx.Graph, decisions: Sequence[Decision]) -> Described:
    """Describes ``graph`` before its rewriting, and numbers the nodes of its sites: what takes their place inherits the number."""
    for number, decision in enumerate(decisions):
        if decision.site is not None:
            for node in (decision.site.node, *gu.waits(decision.site.node)):
                node.meta[gu.SITE] = number
    return Described(readable(graph), describe_nodes(graph), _describe_sites(decisions))


def describe_function(function: Callable[..., Any], examples: Mapping[str, Tensor]) -> tuple[str, tuple[NodeReport, ...]]:
    """Traces a function that makes up one site; returns its readable code and its nodes. ``examples``: its arguments by name."""
    module = trace(function, list(examples.values()))
    for node, name in zip(module.graph.find_nodes(op="placeholder"), examples, strict=True):
        node._rename(name)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.meta[gu.SITE] = 0
    return readable(module.graph), describe_nodes(module.graph)


def readable(graph: fx.Graph) -> str:
    """Returns the graph as annotated Python code."""
    module = graph.owning_module
    assert module is not None
    module.recompile()
    return module.print_readable(print_output=False)


def describe_nodes(graph: fx.Graph) -> tuple[NodeReport, ...]:
    """Returns all nodes, in graph order."""
    backward = gu.reachable_from(gu.tangents(graph))
    return tuple(_describe_node(node, node in backward) for node in graph.nodes)


def _describe_node(node: fx.Node, backward: bool) -> NodeReport:
    tensor, line = gu.value(node), source_line(node)
    return NodeReport(
        name=node.name,
        operator=_operator(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        shape=tuple(gu.hint(size) for size in tensor.shape) if tensor is not None else None,
        dtype=str(tensor.dtype).removeprefix("torch.") if tensor is not None else "",
        size=gu.numel_hint(tensor) * tensor.itemsize if tensor is not None else 0,
        source=line.place if line is not None else "",
        code=line.code if line is not None else "",
        site=node.meta.get(gu.SITE),
        backward=backward or node.meta.get("partitioner_tag") == "is_backward",
    )


def _operator(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.op
    target: Any = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _describe_sites(decisions: Sequence[Decision]) -> list[SiteReport]:
    numbers = {id(decision.site): number for number, decision in enumerate(decisions)}
    pairs: dict[int, int] = {}
    for number, decision in enumerate(decisions):
        if decision.site is not None and decision.site.twin is not None:
            forward = numbers[id(decision.site.twin)]
            pairs[number], pairs[forward] = forward, number
    return [describe_site(decision, number, pairs.get(number)) for number, decision in enumerate(decisions)]


def describe_site(decision: Decision, number: int = 0, pair: int | None = None) -> SiteReport:
    """Describes what was decided about one exchange. ``number``: its place in its graph; ``pair``: the number of its twin."""
    exchange = decision.exchange
    line = source_line(decision.site.node) if decision.site is not None else None
    return SiteReport(
        collective=exchange.collective.name,
        kind=exchange.kind,
        name=exchange.name,
        shape=exchange.shape or (),
        dtype=str(exchange.dtype).removeprefix("torch.") if exchange.dtype is not None else "",
        decision="compressed" if decision.compressed else "dense",
        reason=decision.reason,
        dense_bytes=decision.dense_bytes,
        wire_bytes=decision.wire_bytes,
        group=exchange.group,
        group_size=exchange.ranks,
        density=decision.offer.density if decision.offer is not None else None,
        offers=dict(decision.offers),
        source=line.place if line is not None else "",
        number=number,
        pair=pair,
        seconds=decision.seconds,
        dense_seconds=decision.dense_seconds,
        hops=decision.traffic.hops,
        memory_bytes=decision.traffic.memory_bytes,
        inside_bytes=decision.traffic.inside_bytes,
    )
