"""Tells where the result of a collective goes: it leaves the graph as it is, is written to an input, or is computed with."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
_ARITHMETIC = gu.SCALING_OPS | {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.neg.default,
    aten.lerp.Scalar,
    aten.lerp.Tensor,
    aten.where.self,
}


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
        an input, such as a buffer, possibly after some arithmetic (a running average). :data:`COMPUTED` otherwise.
    """
    found = {COMPUTED}
    stack = [(wait, True) for wait in gu.waits(node)]
    seen = set(stack)
    while stack:
        current, intact = stack.pop()
        for user in current.users:
            if user.op == "output":
                outputs = gu.outputs(user.graph)
                places = {results.places.get(place, COMPUTED) for place, result in enumerate(outputs) if result is current}
                found |= places if intact else places - {RETURNED}
            elif user.target is aten.copy_.default and user.args[1] is current:
                found.add(STORED)
            elif user.target in _MOVES or user.target in _ARITHMETIC:
                step = (user, intact and (user.target in _MOVES or _shifts(user, current, results)))
                if step not in seen:
                    seen.add(step)
                    stack.append(step)
    return next(place for place in (STORED, RETURNED, COMPUTED) if place in found)


def _shifts(node: fx.Node, operand: fx.Node, results: Results) -> bool:
    """Returns True if ``node`` scales or shifts ``operand`` by a number, or by what depends on no activation."""
    others: list[Any] = list(node.args)
    others.remove(operand)
    return all(other in results.fixed or _is_number(other) for other in others if isinstance(other, fx.Node))


def _is_number(node: fx.Node) -> bool:
    tensor = gu.value(node)
    return tensor is None or all(isinstance(size, int) and size == 1 for size in tensor.shape)
