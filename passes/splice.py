"""Puts a traced Python function in the place of a collective: schemes are written as functions of tensors, and become nodes here.

::

    started = all_reduce(x)             payload  = pack(x)                 what waits for nothing starts where the collective started
    ...                          ==>    gathered = all_gather(payload)
    y = wait_tensor(started)            ...
                                        waited   = wait_tensor(gathered)   what depends on a wait stands where the wait stood
                                        y        = unpack(waited)

So the work between the collective and its wait still runs beside the exchange.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from dct_compile.passes import graph_utils as gu


def trace(function: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """Traces ``function(*values)``.

    Operators are decomposed as in the rest of a joint graph: Inductor has no code for those that it decomposes.

    Args:
        function: The function to trace.
        values: Its arguments. Fake tensors and symbolic integers give a graph with the same shapes.

    Returns:
        The traced graph, with one placeholder per argument.
    """

    def run(*arguments: Any) -> Any:  # fx counts the parameters of a bound method wrongly
        return function(*arguments)

    # Not the mode of a compilation that may be going on: the examples can be of another one.
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), nullcontext())
    with torch.no_grad(), mode:
        return make_fx(run, select_decomp_table())(*values)


def splice(function: Callable[..., Any], inputs: Sequence[fx.Node], start: fx.Node, finish: fx.Node, meta: Mapping[str, Any]) -> Any:
    """Inserts the nodes of ``function``, called with ``inputs``.

    Args:
        function: The function to trace.
        inputs: The nodes that stand for its arguments: tensors or symbolic integers.
        start: Nodes that depend on no wait are inserted before this one.
        finish: Nodes that depend on a wait are inserted before this one.
        meta: Entries for the ``meta`` of each inserted node.

    Returns:
        The results of ``function``, with nodes for tensors.
    """
    distinct = list(dict.fromkeys(inputs))  # a trace takes one tensor for one argument
    structure: list[pytree.TreeSpec] = []

    def run(*values: Any) -> Any:
        by_node = dict(zip(distinct, values, strict=True))
        leaves, spec = pytree.tree_flatten(function(*(by_node[node] for node in inputs)))
        structure.append(spec)
        return leaves

    traced = trace(run, [node.meta["val"] for node in distinct])
    copies = copy_nodes(traced, distinct, lambda inner, late: finish if late else start, meta)
    results = gu.output_node(traced.graph).args[0]
    return pytree.tree_unflatten([copies.get(node, node) for node in results], structure[-1])  # type: ignore[union-attr]


def copy_nodes(
    traced: fx.GraphModule, inputs: Sequence[fx.Node], before: Callable[[fx.Node, bool], fx.Node], meta: Mapping[str, Any]
) -> dict[Any, fx.Node]:
    """Copies the nodes of a traced graph into the graph of ``inputs``.

    Args:
        traced: The graph to copy.
        inputs: The nodes that take the place of its placeholders, in order.
        before: ``before(node, late)`` is the node before which a copy is inserted; ``late`` is True if ``node`` depends on a wait.
        meta: Entries for the ``meta`` of each copy.

    Returns:
        The copy of each node.
    """
    copies: dict[Any, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    late: set[fx.Node] = set()
    for inner in traced.graph.nodes:
        if inner.op in ("placeholder", "output"):
            continue
        if inner.target is gu.WAIT or any(source in late for source in inner.all_input_nodes):
            late.add(inner)
        follower = before(inner, inner in late)
        with follower.graph.inserting_before(follower):
            if inner.op == "get_attr":
                copies[inner] = _constant(follower.graph, getattr(traced, inner.target))
            else:
                copies[inner] = follower.graph.node_copy(inner, copies.__getitem__)
        copies[inner].meta = {**meta, "val": inner.meta.get("val")}
    return copies


def _constant(graph: fx.Graph, value: Tensor) -> fx.Node:
    """Makes ``value`` an attribute of the graph's module, under a name that is free there."""
    module = graph.owning_module
    assert module is not None
    name = next(name for name in map("dct_table_{}".format, count()) if not hasattr(module, name))
    module.register_buffer(name, value, persistent=False)
    return graph.get_attr(name)
