"""Tells where the result of a collective goes: it leaves the graph as it is, is written to an input, or is computed with."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dct_compile.exchange import COMPUTED, RETURNED, STORED
from dct_compile.passes import graph_utils as gu

aten = gu.aten
_MOVES = gu.SHAPE_OPS | {
    operator.getitem,
    aten.detach.default,
    aten.copy.default,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.diagonal.default,
    aten.as_strided.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.scatter.src,
    aten.index_put.default,
    aten.index_copy.default,
}
_ARITHMETIC = gu.LINEAR_OPS | {
    aten.lerp.Scalar,
    aten.lerp.Tensor,
    aten.where.self,
}
_STATISTICS = frozenset(
    {
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.mean.default,
        aten.mean.dim,
        aten.var.correction,
        aten.var_mean.correction,
        aten.amax.default,
        aten.amin.default,
        aten.maximum.default,
        aten.minimum.default,
        aten.abs.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.pow.Tensor_Scalar,
        aten.addcmul.default,
        aten.addcdiv.default,
        *([torch.ops.prims.fma.default] if hasattr(torch.ops.prims, "fma") else []),  # newer versions make addcmul of it
    }
)
"""What makes the statistics of a running average. A layer uses them, too, as a norm: they count if nothing else uses the result."""


@dataclass(frozen=True)
class Results:
    """The results of a graph that are not gradients.

    ``places``: by position of the output, :data:`RETURNED` or :data:`STORED` (the new value of an input). ``fixed``: the nodes that depend
    on no activation, but on parameters, inputs that are written to, and constants alone.
    """

    places: Mapping[int, str]
    fixed: frozenset[fx.Node]


def read_results(graph: fx.Graph, places: Mapping[int, str], constant: Iterable[fx.Node]) -> Results:
    """Reads the results of ``graph``. ``constant``: the placeholders that stand for parameters, or for inputs that are written to."""
    fixed = set(constant)
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_function" and all(source in fixed for source in node.all_input_nodes)):
            fixed.add(node)
    return Results(places, frozenset(fixed))


def destination(node: fx.Node, results: Results) -> str:
    """Returns where the result of a collective goes.

    Args:
        node: The collective.
        results: The results of its graph.

    Returns:
        :data:`RETURNED` if it is returned: moved about, scaled or shifted by what is no activation. :data:`STORED` if it is written to
        an input, such as a buffer, possibly after some arithmetic (a running average), or if nothing but statistics that are made of it
        is used, and written. :data:`COMPUTED` otherwise.
    """
    found, kept, used = {COMPUTED}, False, False
    stack = [(wait, True, False) for wait in gu.waits(node)]  # a node, if it is the result as it was, if it is a statistic of it
    seen = set(stack)
    while stack:
        current, intact, reduced = stack.pop()
        places = _places(current, results)
        if STORED in places and reduced:
            kept = True
            continue  # what else uses it, uses the new value of the input
        found |= places if intact else places - {RETURNED}
        for user in current.users:
            followed = user.target in _MOVES or user.target in _ARITHMETIC or user.target in _STATISTICS
            used = used or not (followed or user.op == "output" or user.target in gu.METADATA_OPS)
            still = intact and (user.target in _MOVES or (user.target in _ARITHMETIC and _shifts(user, current, results)))
            step = (user, still, reduced or user.target in _STATISTICS)
            if followed and step not in seen:
                seen.add(step)
                stack.append(step)
    found |= {STORED} if kept and not used else set()
    return next(place for place in (STORED, RETURNED, COMPUTED) if place in found)


def _places(node: fx.Node, results: Results) -> set[str]:
    """Returns the destinations of ``node`` itself: where the graph returns it, and :data:`STORED` if it is copied to an input."""
    found: set[str] = set()
    for user in node.users:
        if user.op == "output":
            found |= {results.places.get(place, COMPUTED) for place, result in enumerate(gu.outputs(user.graph)) if result is node}
        elif user.target is aten.copy_.default and user.args[1] is node:
            found.add(STORED)
    return found


def _shifts(node: fx.Node, operand: fx.Node, results: Results) -> bool:
    """Returns True if ``node`` scales or shifts ``operand`` by a number, or by what depends on no activation."""
    others: list[Any] = list(node.args)
    others.remove(operand)
    return all(other in results.fixed or _is_number(other) for other in others if isinstance(other, fx.Node))


def _is_number(node: fx.Node) -> bool:
    tensor = gu.value(node)
    return tensor is None or all(isinstance(size, int) and size == 1 for size in tensor.shape)
