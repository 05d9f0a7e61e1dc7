"""Finds the collectives in the subgraphs of higher-order operators: branches, loop bodies, compiled regions. They are left as they are."""

from collections.abc import Iterator

import torch
from torch import fx

from dct_compile.passes import graph_utils as gu
from dct_compile.passes.sites import GraphContext, Site, find_sites


def subgraph_sites(graph: fx.Graph, context: GraphContext) -> list[Site]:
    """Finds the collectives in the subgraphs of ``graph``, and in theirs. A subgraph that several calls share counts once per call.

    Args:
        graph: A joint graph of forward and backward, or a forward or backward alone.
        context: The meaning of its inputs and outputs.

    Returns:
        The sites, in graph order, each with the innermost operator that it stands in.
    """
    backward = gu.reachable_from(context.tangents)
    sites: list[Site] = []
    for node, subgraph in _subgraphs(graph):
        # What the backward calls is a backward, whatever its inputs are.
        tangents = gu.placeholders(subgraph) if node in backward else gu.tangents(subgraph)
        inner = GraphContext(context.training, tangents=tangents, backward_only=context.backward_only)
        found = find_sites(subgraph, inner)
        for site in found:
            site.operator = node.target.name()  # type: ignore[union-attr]
        sites += [*found, *subgraph_sites(subgraph, inner)]
    return sites


def _subgraphs(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Graph]]:
    """Yields the calls of higher-order operators, with each graph that they are given."""
    assert graph.owning_module is not None
    modules = dict(graph.owning_module.named_modules())
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for source in node.all_input_nodes:
                module = modules.get(source.target) if source.op == "get_attr" else None
                if isinstance(module, fx.GraphModule):
                    yield node, module.graph
