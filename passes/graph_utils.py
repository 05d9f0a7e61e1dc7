"""Small helpers over FX graphs that hold functional collectives."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.distributed import ProcessGroup, distributed_c10d
from torch.fx.traceback import NodeSource, NodeSourceAction

from dct_compile.passes.device_copy import is_device_copy

c10d = torch.ops._c10d_functional
aten = torch.ops.aten

WAIT = c10d.wait_tensor.default
SITE = "dct_site"
"""The key of a node's ``meta`` that holds the number of the site it belongs to, in the dense graph as in the rewritten one."""

_CHECKPOINTING = ("recompute", "ac_graph_id")
"""The keys of a node's ``meta`` that say whether the backward computes it again (``torch.utils.checkpoint``), and of which region it is."""

SHAPE_OPS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.cat.default,
        aten.stack.default,
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.clone.default,
        aten.alias.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten._to_copy.default,
        torch.ops.prims.convert_element_type.default,
        aten.constant_pad_nd.default,
    }
)
"""Operators that move elements about and compute nothing with them."""

METADATA_OPS = frozenset(
    {
        aten.sym_size.int,
        aten.sym_size.default,
        aten.sym_stride.int,
        aten.sym_stride.default,
        aten.sym_numel.default,
        aten.sym_storage_offset.default,
    }
)
"""Operators that ask for the shape of a tensor and read none of its values."""

SCALING_OPS = frozenset({aten.div.Tensor, aten.mul.Tensor, aten.div.Scalar, aten.mul.Scalar})
LINEAR_OPS = SCALING_OPS | {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.neg.default,
}
"""Sums, differences and multiples, element by element."""

_PADDING_OPS = frozenset({aten.constant_pad_nd.default, aten._to_copy.default, torch.ops.prims.convert_element_type.default})


def argument(node: fx.Node, name: str) -> Any:
    """Returns an operator argument by its schema name. Raises ``KeyError`` where the operator has none of that name."""
    for position, schema in enumerate(_schema_arguments(node)):
        if schema.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, schema.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def optional_argument(node: fx.Node, name: str) -> Any:
    """Returns an operator argument by its schema name, ``None`` where the operator has none of that name."""
    return argument(node, name) if any(schema.name == name for schema in _schema_arguments(node)) else None


def _schema_arguments(node: fx.Node) -> Any:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.arguments


def process_group(node: fx.Node) -> ProcessGroup | None:
    """Returns the process group of a collective; ``None`` where its arguments do not name one."""
    group = optional_argument(node, "group_name")
    if group is None or isinstance(group, ProcessGroup):
        return group
    return resolve_group(group)


def resolve_group(name: str) -> ProcessGroup:
    """Returns the process group of that name in this process."""
    group: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
    return group


def waits(node: fx.Node) -> list[fx.Node]:
    """Returns the nodes that wait for a collective's result. A copy between devices is its own: it needs no wait."""
    return [node] if is_device_copy(node) else [user for user in node.users if user.target is WAIT]


def value(node: fx.Node) -> Tensor | None:
    """Returns the fake tensor that ``node`` stands for."""
    val = node.meta.get("val")
    return val if isinstance(val, Tensor) else None


def hint(size: int | SymInt) -> int:
    """Returns a size as a number: exact where it is static, the traced example's where it is symbolic, 0 where nothing is known."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def numel_hint(tensor: Tensor) -> int:
    """Returns the number of elements, see :func:`hint`."""
    total = 1
    for size in tensor.shape:
        total *= hint(size)
    return total


def reachable_from(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the roots and every node that depends on them."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen


def sources(node: fx.Node) -> set[fx.Node]:
    """Returns the nearest producers of ``node``'s values that are not shape operations (``getitem`` counts as one)."""
    seen: set[fx.Node] = set()
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target in SHAPE_OPS:
            tensors = current.args[0]
            stack.extend([tensors] if isinstance(tensors, fx.Node) else [item for item in tensors if isinstance(item, fx.Node)])  # type: ignore[union-attr]
        elif _is_getitem_of_shape_op(current):
            stack.append(current.args[0])  # type: ignore[arg-type]
        else:
            found.add(current)
    return found


def unpadded(node: fx.Node) -> fx.Node:
    """Returns the producer of the values of ``node``, padding and casts left out: a shard may be shorter than those of other ranks."""
    while node.target in _PADDING_OPS and len(found := sources(node.args[0])) == 1:  # type: ignore[arg-type]
        (node,) = found
    return node


def _is_getitem_of_shape_op(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in SHAPE_OPS


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes of the graph's inputs, in order."""
    return list(graph.find_nodes(op="placeholder"))


def tangents(graph: fx.Graph) -> list[fx.Node]:
    """Returns the inputs of the backward part of a joint graph."""
    return [node for node in placeholders(graph) if node.name.startswith("tangents")]


def output_node(graph: fx.Graph) -> fx.Node:
    """Returns the one node that returns the graph's results."""
    node: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return node


def outputs(graph: fx.Graph) -> list[Any]:
    """Returns the graph's results, in order. The subgraph of a higher-order operator may return one that is not in a list."""
    results = output_node(graph).args[0]
    return list(results) if isinstance(results, list | tuple) else [results]


def inherited(like: fx.Node, label: str) -> dict[str, Any]:
    """Returns the ``meta`` of nodes that stand for ``like``: its source line, its site, and ``label`` as the name of their origin.

    Inductor prints the origin above each call of its code. What activation checkpointing asks for holds for them, too.
    """
    kept = {key: like.meta[key] for key in ("stack_trace", SITE, *_CHECKPOINTING) if like.meta.get(key) is not None}
    return {**kept, "from_node": [_origin(like, label)]} if label else kept


def _origin(node: fx.Node, label: str) -> NodeSource:
    source = NodeSource(node, "dct_compile", NodeSourceAction.REPLACE)
    assert source.node_info is not None
    source.node_info.name = label
    return source
