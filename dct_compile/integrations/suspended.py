"""Suspends the function of a scheme at its collectives: it is traced once, and then run node by node as a generator.

::

    payload  = pack(grad)                 runs
    gathered = all_gather(payload)        noted as a Request, not started
    waited   = wait_tensor(gathered)      yields the requests; goes on with their results, whoever has sent them
    mean     = unpack(waited)             runs
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dct_compile.passes.graph_utils import WAIT

c10d = torch.ops._c10d_functional
ALL_GATHER, ALL_TO_ALL, ALL_REDUCE = c10d.all_gather_into_tensor.default, c10d.all_to_all_single.default, c10d.all_reduce.default


@dataclass(frozen=True)
class Request:
    """A collective to be sent, over a group that is known: ``collective`` of ``x``. ``op``: the operation of an all_reduce."""

    collective: Any
    x: Tensor
    op: str = ""


Steps = Generator[list[Request], list[Tensor], Tensor]
"""A function under way: it yields requests, is sent their results in the same order, and returns its own result."""


def run(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> Steps:
    """Runs a traced function of one result up to each wait for a collective.

    A collective whose result is not merely waited for runs at its place, like any other operator.

    Args:
        traced: The function, as ``passes.splice.trace`` returns it.
        inputs: Its arguments.

    Yields:
        The collectives that were reached since the last time.

    Returns:
        The result of the function.
    """
    values: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    reached: dict[fx.Node, Request] = {}
    last_uses = _last_uses(traced.graph)
    for node in traced.graph.nodes:
        if node.op == "output":
            return values[node.args[0]]  # type: ignore[no-any-return]
        if node.op == "get_attr":
            values[node] = getattr(traced, node.target)
        elif node.op == "call_function":
            source = node.args[0] if node.target is WAIT else None
            if source in reached:
                results = yield list(reached.values())
                values.update(zip(reached, results, strict=True))
                reached.clear()
            if isinstance(source, fx.Node) and _is_request(source):
                values[node] = values[source]
            else:
                arguments, keywords = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if _is_request(node):
                    reached[node] = Request(node.target, arguments[0], arguments[1] if node.target is ALL_REDUCE else "")
                else:
                    values[node] = node.target(*arguments, **keywords)
        for unused in last_uses.get(node, ()):
            values.pop(unused, None)
    raise AssertionError("a traced graph has an output")


def _is_request(node: fx.Node) -> bool:
    return node.target in (ALL_GATHER, ALL_TO_ALL, ALL_REDUCE) and all(user.target is WAIT for user in node.users)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Returns for each node the values that nothing uses after it, so that a buffer is not held longer than needed."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
    return last
