"""Small helpers over FX graphs that hold functional collectives."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.distributed import ProcessGroup, distributed_c10d
from torch.fx.traceback import NodeSource, NodeSourceAction

c10d = torch.ops._c10d_functional
aten = torch.ops.aten

WAIT = c10d.wait_tensor.default
SITE = "dct_site"
"""The key of a node's ``meta`` that holds the number of the site it belongs to, in the dense graph as in the rewritten one."""
_NOT_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")

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

SCALING_OPS = frozenset({aten.div.Tensor, aten.mul.Tensor, aten.div.Scalar, aten.mul.Scalar})


def collective_name(node: fx.Node) -> str | None:
    """The collective's name ("all_reduce", ...) if ``node`` starts a functional collective."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, _, name = node.target._schema.name.partition("::")
    if namespace != "_c10d_functional" or name in _NOT_COLLECTIVES:
        return None
    return name


def argument(node: fx.Node, name: str) -> Any:
    """An operator argument by its schema name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, schema in enumerate(node.target._schema.arguments):
        if schema.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, schema.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def process_group(node: fx.Node) -> ProcessGroup:
    """The process group of a collective."""
    group = argument(node, "group_name")
    return group if isinstance(group, ProcessGroup) else resolve_group(group)


def resolve_group(name: str) -> ProcessGroup:
    """The process group of that name in this process."""
    group: ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
    return group


def waits(node: fx.Node) -> list[fx.Node]:
    """The nodes that wait for a collective's result."""
    return [user for user in node.users if user.target is WAIT]


def value(node: fx.Node) -> Tensor | None:
    """The fake tensor that ``node`` stands for."""
    val = node.meta.get("val")
    return val if isinstance(val, Tensor) else None


def hint(size: int | SymInt) -> int:
    """A size as a number: exact where it is static, the traced example's where it is symbolic, 0 where nothing is known."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def numel_hint(tensor: Tensor) -> int:
    """The number of elements, see :func:`hint`."""
    total = 1
    for size in tensor.shape:
        total *= hint(size)
    return total


def reachable_from(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The roots and every node that depends on them."""
    seen: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.users)
    return seen


def sources(node: fx.Node) -> set[fx.Node]:
    """The nearest producers of ``node``'s values that are not shape operations (``getitem`` counts as one)."""
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


def _is_getitem_of_shape_op(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in SHAPE_OPS


def output_node(graph: fx.Graph) -> fx.Node:
    """The one node that returns the graph's results."""
    node: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return node


class Inserter:
    """Adds call nodes before a node, with ``meta["val"]`` computed by running the operator on the arguments' fake tensors.

    New nodes take over the source line and the site of ``like``. ``label`` is what the comments of Inductor's code call their origin.
    ``in_backward`` nodes are tagged for the partitioner, which would otherwise move an operator that mutates state to the forward graph.
    """

    def __init__(self, graph: fx.Graph, before: fx.Node, like: fx.Node, in_backward: bool = False, label: str = "") -> None:
        self.graph, self.before = graph, before
        self.meta: dict[str, Any] = {key: like.meta[key] for key in ("stack_trace", SITE) if like.meta.get(key) is not None}
        if label:
            self.meta["from_node"] = [_origin(like, label)]
        if in_backward:
            self.meta["partitioner_tag"] = "is_backward"

    def call(self, target: Any, *args: Any, **names: Any) -> fx.Node:
        """Inserts ``target(*args, **names)``."""
        name = target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else target.__name__
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node("call_function", target, args, names, name=name)
        node.meta.update(self.meta)
        node.meta["val"] = target(*fx.node.map_arg(args, lambda item: item.meta["val"]), **names)
        return node


def _origin(node: fx.Node, label: str) -> NodeSource:
    source = NodeSource(node, "dct_compile", NodeSourceAction.REPLACE)
    assert source.node_info is not None
    source.node_info.name = label
    return source
