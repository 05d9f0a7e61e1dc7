"""Rewrites collectives on activations and embeddings: encode, exchange, decode.

A masked site and its backward twin, here an all_to_all ("mask")::

    y  = all_to_all_single(x)            payload  = dct.pack_rows(x)              k values and their indices per row
                                         received = all_to_all_single(payload)
                                  ==>    y        = dct.unpack_rows(received)
    dx = all_to_all_single(dy)           values   = dct.gather_rows(dy, received) at the indices that the receiver already has
                                         returned = all_to_all_single(values)     no index travels backward
                                         dx       = dct.scatter_rows(returned, payload)

An all_gather keeps its all_gather; its backward reduce_scatter becomes an all_to_all of the values at each owner's indices, summed where
they arrive. Sums cannot be taken of encoded rows: a reduce_scatter becomes an all_to_all, an all_reduce an all_gather, and the sum is
taken while decoding. A quantised site ("quantize") encodes forward and backward independently of each other. Which sites are rewritten
is the plan's affair; this pass declines nothing. A row-parallel layer's all_reduce has no collective in its backward: there the mask is
applied to the gradient in place.
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.config import DCTConfig
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.plan import Decision
from dct_compile.passes.sites import Site
from dct_compile.triton_kernels.layout import RowLayout

aten, c10d, dct = torch.ops.aten, torch.ops._c10d_functional, torch.ops.dct


def compress_activations(graph: fx.Graph, decisions: Sequence[Decision], config: DCTConfig) -> int:
    """Executes the "mask" and "quantize" decisions on ``graph``; returns the number of sites that were rewritten."""
    backward = {id(decision.site.twin): decision for decision in decisions if decision.site.twin is not None}
    rewritten = 0
    for ordinal, decision in enumerate(decisions):
        if decision.codec == "quantize":
            _quantize(decision, ordinal)
            rewritten += 1
        elif decision.codec == "mask" and decision.site.twin is None:
            payload, received = _mask_forward(decision, config)
            rewritten += 1
            twin = backward.get(id(decision.site))
            if twin is not None:
                _mask_backward(twin.site, decision, payload, received, config)
                rewritten += 1
            elif decision.site.local_gradient is not None:
                _mask_local_gradient(decision, payload, config)
    return rewritten


def _mask_forward(decision: Decision, config: DCTConfig) -> tuple[fx.Node, fx.Node]:
    site = decision.site
    at = gu.Inserter(site.node.graph, site.node, site.node, label=site.label)
    x, tensor = _input(site)
    method = "exact" if config.threshold_method == "sampled" else config.threshold_method
    carrier = _carrier(site)
    payload = at.call(
        dct.pack_rows.default,
        *(x, _layout(tensor, decision, config), method, config.mp_density, config.fixed_threshold),
        site=site.label,
        sends=carrier,
    )
    received = _exchange(at, site, payload)
    addends = _addends(site)
    y = at.call(
        dct.unpack_rows.default,
        *(received, _layout(tensor, decision, config), addends, tensor.dtype),
        site=site.label,
        receives=carrier,
    )
    _replace(site, _average(at, site, y))
    return payload, received


def _mask_backward(site: Site, forward: Decision, payload: fx.Node, received: fx.Node, config: DCTConfig) -> None:
    at = gu.Inserter(site.node.graph, site.node, site.node, label=site.label)
    gradient, tensor = _input(site)
    carrier = "all_to_all_single"
    layout = _layout(tensor, forward, config)
    values = at.call(dct.gather_rows.default, gradient, received, layout, config.mp_dtype, site=site.label, sends=carrier)
    same_splits = site.collective == "all_to_all_single"
    returned = _exchange(at, site, values) if same_splits else _even_all_to_all(at, site, values)
    addends = site.group_size if site.collective in ("reduce_scatter_tensor", "all_reduce") else 1
    dx = at.call(
        dct.scatter_rows.default,
        *(returned, payload, layout, addends, tensor.dtype),
        site=site.label,
        receives=carrier,
    )
    _replace(site, _average(at, site, dx))


def _mask_local_gradient(decision: Decision, payload: fx.Node, config: DCTConfig) -> None:
    """Applies the mask where the backward sends nothing: the gradient of a row-parallel layer's output is already on every rank."""
    assert decision.site.local_gradient is not None
    gradient, users = decision.site.local_gradient
    first = next(node for node in gradient.graph.nodes if node in users)
    label = f"{decision.site.label} backward"
    at = gu.Inserter(gradient.graph, first, decision.site.node, label=label)
    tensor = gradient.meta["val"]
    layout = _layout(tensor, decision, config)
    values = at.call(dct.gather_rows.default, gradient, payload, layout, tensor.dtype, site=label)
    masked = at.call(dct.scatter_rows.default, values, payload, layout, 1, tensor.dtype, site=label)
    for user in users:
        user.replace_input_with(gradient, masked)


def _layout(tensor: torch.Tensor, decision: Decision, config: DCTConfig) -> RowLayout:
    return RowLayout(tuple(int(size) for size in tensor.shape[1:]), decision.slots, config.mp_dtype)


def _quantize(decision: Decision, ordinal: int) -> None:
    site = decision.site
    at = gu.Inserter(site.node.graph, site.node, site.node, label=site.label)
    x, tensor = _input(site)
    carrier = _carrier(site)
    codes = at.call(dct.quantize_rows.default, x, _seed(at, x, ordinal), decision.bits, site=site.label, sends=carrier)
    received = _exchange(at, site, codes)
    row_shape = [int(size) for size in tensor.shape[1:]]
    y = at.call(dct.dequantize_rows.default, received, row_shape, decision.bits, tensor.dtype, site=site.label, receives=carrier)
    if (addends := _addends(site)) > 1:
        y = at.call(aten.sum.dim_IntList, at.call(aten.reshape.default, y, [addends, -1, *row_shape]), [0])
    _replace(site, _average(at, site, y))


def _seed(at: gu.Inserter, x: fx.Node, ordinal: int) -> fx.Node:
    """A seed made of the data's own bits: it changes with every batch, leaves torch's generators alone, and a resumed run repeats it."""
    bits = torch.int32 if x.meta["val"].itemsize == 4 else torch.int16
    total = at.call(aten.sum.default, at.call(aten.view.dtype, x, bits))
    return at.call(aten.reshape.default, at.call(aten.add.Tensor, total, ordinal), [1])


def _input(site: Site) -> tuple[fx.Node, torch.Tensor]:
    """The node that feeds the collective now (the rewriting of another site may have replaced the one that was analysed)."""
    node = site.node.args[0]
    assert isinstance(node, fx.Node), "the plan leaves sites without a known input dense"
    assert site.tensor is not None, "the plan leaves sites of unknown shape dense"
    return node, site.tensor


def _addends(site: Site) -> int:
    return site.group_size if site.collective in ("reduce_scatter_tensor", "all_reduce") else 1


def _carrier(site: Site) -> str:
    """The collective by which :func:`_exchange` sends: sums cannot be taken of encoded rows."""
    return "all_gather_into_tensor" if site.collective in ("all_gather_into_tensor", "all_reduce") else "all_to_all_single"


def _exchange(at: gu.Inserter, site: Site, payload: fx.Node) -> fx.Node:
    """Sends an encoded input the way the site's collective would, and waits for it."""
    group = gu.argument(site.node, "group_name")
    if site.collective == "all_to_all_single":
        splits = gu.argument(site.node, "output_split_sizes"), gu.argument(site.node, "input_split_sizes")
        started = at.call(c10d.all_to_all_single.default, payload, *splits, group)
    elif site.collective == "reduce_scatter_tensor":
        return _even_all_to_all(at, site, payload)
    else:
        started = at.call(c10d.all_gather_into_tensor.default, payload, site.group_size, group)
    return at.call(gu.WAIT, started)


def _even_all_to_all(at: gu.Inserter, site: Site, payload: fx.Node) -> fx.Node:
    rows = payload.meta["val"].shape[0]
    if isinstance(rows, int):
        split: int | fx.Node = rows // site.group_size
    else:
        split = at.call(operator.floordiv, at.call(aten.sym_size.int, payload, 0), site.group_size)
    splits = [split] * site.group_size
    started = at.call(c10d.all_to_all_single.default, payload, splits, splits, gu.argument(site.node, "group_name"))
    return at.call(gu.WAIT, started)


def _average(at: gu.Inserter, site: Site, total: fx.Node) -> fx.Node:
    if site.collective in ("reduce_scatter_tensor", "all_reduce") and gu.argument(site.node, "reduce_op").lower() == "avg":
        return at.call(aten.div.Tensor, total, site.group_size)
    return total


def _replace(site: Site, result: fx.Node) -> None:
    """Lets ``result`` stand for the collective's waited result, then removes the wait before the collective (both have side effects)."""
    for wait in gu.waits(site.node):
        wait.replace_all_uses_with(result)
        site.node.graph.erase_node(wait)
    site.node.graph.erase_node(site.node)
