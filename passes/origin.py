"""Tells where the input of a collective comes from: a table of embeddings, a parameter, a ReLU, a mask, or something else."""

import operator
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from dct_compile.exchange import COUNTED, EMBEDDING, FILLED, FOREIGN, PARAMETER, RECTIFIED, UNKNOWN
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.collectives import collective_of
from dct_compile.passes.exact import is_counted, is_filled

aten = gu.aten
EMBEDDING_OPS = frozenset(
    {
        aten.embedding.default,
        aten._embedding_bag.default,
        aten._embedding_bag_forward_only.default,
        aten.embedding_bag.default,
    }
)
_KEEP_ZEROS = frozenset(
    {
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.pow.Tensor_Scalar,
        aten.clamp_max.default,
        aten.native_dropout.default,
    }
)
"""Operators whose result is zero where their first argument is; a product also where its second is, as in a dropout."""


def origin(node: fx.Node, parameters: Collection[fx.Node], foreign: Collection[fx.Node]) -> str:
    """Returns where the values of ``node`` come from, through operations that only move elements and collectives that only move rows.

    Args:
        node: The input of a collective.
        parameters: The placeholders that stand for parameters.
        foreign: The placeholders of what another part of the model has computed.

    Returns:
        One of the origins of :class:`dct_compile.exchange.Exchange`.
    """
    producers = set(_producers(node))
    if producers and all(gu.unpadded(producer) in parameters for producer in producers):
        return PARAMETER
    if producers and all(_is_embedding(producer) for producer in producers):
        return EMBEDDING
    if is_counted(node, _moved_by_ranks):
        return COUNTED
    if is_filled(node, _moved_by_ranks):
        return FILLED
    if producers and all(_is_rectified(producer) for producer in producers):
        return RECTIFIED
    return FOREIGN if any(producer in foreign for producer in producers) else UNKNOWN


def _producers(node: fx.Node) -> Iterator[fx.Node]:
    """Yields the nearest producers of the node's values that compute them."""
    for producer in gu.sources(node):
        moved = _moved_by_ranks(producer)
        if moved is None:
            yield producer
        else:
            yield from _producers(moved)


def _moved_by_ranks(wait: fx.Node) -> fx.Node | None:
    """Returns the input of the collective whose result ``wait`` is, where it adds nothing up."""
    started = wait.args[0] if wait.target is gu.WAIT else None
    collective = collective_of(started) if isinstance(started, fx.Node) else None
    if collective is None or collective.sums or not collective.carrier:
        return None
    moved: Any = started.args[0]  # type: ignore[union-attr]
    return moved if isinstance(moved, fx.Node) else None


def _is_embedding(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # _embedding_bag returns a tuple
        return isinstance(node.args[0], fx.Node) and _is_embedding(node.args[0])
    return node.target in EMBEDDING_OPS


def _is_rectified(node: fx.Node) -> bool:
    """Returns True for what has many exact zeros: the result of a ReLU, also scaled, masked by a dropout, or raised to a power."""
    if node.target is aten.relu.default:
        return True
    if node.target is aten.clamp_min.default:
        return bool(node.args[1] == 0) and not _is_shifted(node.args[0])
    if node.target is operator.getitem:  # native_dropout returns its mask, too
        return bool(node.args[1] == 0) and isinstance(node.args[0], fx.Node) and _is_rectified(node.args[0])
    if node.target not in _KEEP_ZEROS:
        return False
    operands = node.args if node.target is aten.mul.Tensor else node.args[:1]
    return any(_is_rectified(producer) for operand in operands if isinstance(operand, fx.Node) for producer in gu.sources(operand))


def _is_shifted(node: Any) -> bool:
    """Returns True for a sum with a number: in a hard swish or sigmoid, few elements are below it."""
    return isinstance(node, fx.Node) and node.target is aten.add.Tensor and not isinstance(node.args[1], fx.Node)
