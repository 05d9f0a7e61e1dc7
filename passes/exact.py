"""Recognises values that codecs would ruin: rows with the large numbers of a mask, counts, and one number for each row."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from dct_compile.passes import graph_utils as gu

aten = gu.aten
_PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_ARITHMETIC = gu.LINEAR_OPS | {
    aten.log.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.pow.Tensor_Scalar,
    aten.where.self,
    aten.triu.default,
    aten.tril.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}
_SUMS = frozenset({aten.sum.dim_IntList, aten.mean.dim})
_REDUCTIONS = _SUMS | frozenset(
    {
        aten.amax.default,
        aten.amin.default,
        aten.max.dim,
        aten.min.dim,
        aten.var.correction,
        aten.var_mean.correction,
    }
)
_FILLS = {
    aten.full.default: "fill_value",
    aten.full_like.default: "fill_value",
    aten.scalar_tensor.default: "s",
    aten.masked_fill.Scalar: "value",
}
"""Operators that put one number into a tensor, and the argument that holds it."""
_LARGE = 16
"""The largest number that a mask may put beside activations: codes of a row share one scale, and lose what is small beside it."""
MovedBy = Callable[[fx.Node], fx.Node | None]
"""Returns the input of the collective whose result a node is, ``None`` where there is none that only moves rows."""


def is_filled(node: fx.Node, moved_by: MovedBy) -> bool:
    """Returns True if a mask has put a large or infinite number among the values of ``node``, or has added one to them."""
    return any(_is_fill(found, moved_by) for found in _made_from(node, moved_by))


def is_counted(node: fx.Node, moved_by: MovedBy) -> bool:
    """Returns True if the values of ``node`` are counts, truth values, or one number for each row, such as a sum or a maximum."""
    ends = [found for found in _made_from(node, moved_by) if _is_count(found) or not _operands(found, moved_by)]
    ends = [end for end in ends if end.target not in _FILLS]
    return bool(ends) and all(_is_count(end) for end in ends)


def _made_from(node: fx.Node, moved_by: MovedBy) -> Iterator[fx.Node]:
    """Yields ``node``, and all that its values are made from by moves and simple arithmetic. It does not look behind counts."""
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        yield current
        if not _is_count(current):
            found = [operand for operand in _operands(current, moved_by) if operand not in seen]
            seen.update(found)
            stack.extend(found)


def _operands(node: fx.Node, moved_by: MovedBy) -> list[fx.Node]:
    """Returns the inputs of a move or of simple arithmetic whose values its result has; an empty list for any other operator."""
    if (moved := moved_by(node)) is not None:
        return [moved]
    first: Any = node.args[:1]
    source: Any = first[0] if first else None
    if node.target in gu.SHAPE_OPS or node.target in _SUMS:
        first = source if isinstance(source, list | tuple) else first
    elif node.target in _ARITHMETIC:
        first = node.args[1:] if node.target is aten.where.self else node.args
    elif node.target is not operator.getitem or source.target not in gu.SHAPE_OPS:
        return []
    return [operand for operand in first if isinstance(operand, fx.Node)]


def _is_fill(node: fx.Node, moved_by: MovedBy) -> bool:
    """Returns True if an operator puts a large number into a tensor, or multiplies a mask of zeros and ones by it."""
    is_product = node.target in _PRODUCTS
    number = node.args[1] if is_product else gu.argument(node, _FILLS[node.target]) if node.target in _FILLS else None
    if not isinstance(number, int | float) or abs(number) <= _LARGE:
        return False
    return not is_product or (isinstance(node.args[0], fx.Node) and is_counted(node.args[0], moved_by))


def _is_count(node: fx.Node) -> bool:
    """Returns True for integers and truth values, and for what has one number for each row of the operator's input."""
    tensor = gu.value(node)
    if tensor is not None and not tensor.is_floating_point():
        return True
    if node.target is operator.getitem:  # max and var_mean return two tensors
        node = node.args[0]  # type: ignore[assignment]
    source = gu.value(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if source is None:
        return False
    if node.target is aten.index.Tensor:  # one entry of each row, as the logit of the target
        indices: Any = node.args[1]
        return tensor is not None and tensor.dim() < source.dim() == len(indices) and indices[-1] is not None
    if node.target is aten.gather.default:
        return tensor is not None and tensor.shape[-1] == 1 and node.args[1] in (-1, source.dim() - 1)
    dims = gu.argument(node, "dim") if node.target in _REDUCTIONS else None
    return dims in (-1, source.dim() - 1, [-1], [source.dim() - 1])
