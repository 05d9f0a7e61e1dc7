"""Executes decisions: puts the function of each scheme in the place of its collective. Declines nothing; only the plan does."""

from collections.abc import Callable, Mapping, Sequence
from itertools import dropwhile, takewhile
from typing import Any

from torch import Tensor, fx

from dct_compile.comm import Comm, DeviceComm
from dct_compile.exchange import Exchange
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.decision import Decision
from dct_compile.passes.device_copy import is_device_copy
from dct_compile.passes.sites import Site
from dct_compile.passes.splice import splice
from dct_compile.schemes import GradientOffer, RowOffer

State = Callable[[Decision], Mapping[str, fx.Node]]


def rewrite(graph: fx.Graph, decisions: Sequence[Decision], state: State) -> int:
    """Rewrites the sites of ``graph`` that are to be compressed.

    Activations come first: the analysis of their inputs' gradients holds nodes that the rewriting of gradients replaces.

    Args:
        graph: The graph to change.
        decisions: The decisions about its sites.
        state: ``state(decision)`` returns the placeholders of a gradient's state, by name.

    Returns:
        The number of rewritten sites.
    """
    chosen = [decision for decision in decisions if decision.compressed]
    backward = {id(decision.site.twin): decision for decision in chosen if decision.site is not None and decision.site.twin is not None}
    for decision in chosen:
        if isinstance(decision.offer, RowOffer) and _site(decision).twin is None:
            _rewrite_rows(decision.offer, _site(decision), backward.get(id(decision.site)))
    for decision in chosen:
        if isinstance(decision.offer, GradientOffer):
            _rewrite_gradient(decision.offer, _site(decision), state(decision))
    graph.lint()
    return len(chosen)


def _site(decision: Decision) -> Site:
    assert decision.site is not None, "only exchanges of a graph are rewritten"
    return decision.site


def _rewrite_gradient(offer: GradientOffer, site: Site, state: Mapping[str, fx.Node]) -> None:
    comm, names = Comm(gu.argument(site.node, "group_name"), site.group_size), list(state)

    def run(grad: Tensor, *tensors: Tensor) -> Tensor:
        flat = grad if grad.dim() == 1 else grad.reshape(-1)
        reduced = offer.reduce(flat, dict(zip(names, tensors, strict=True)), comm)
        return reduced if grad.dim() == 1 else reduced.view(grad.shape)

    # The tag keeps what updates state in the backward: the partitioner would move it to the forward where it could.
    meta = {**gu.inherited(site.node, offer.exchange.label), "partitioner_tag": "is_backward"}
    _replace(site, splice(run, [_input(site), *state.values()], site.node, _first_wait(site), meta))


def _rewrite_rows(offer: RowOffer, site: Site, backward: Decision | None) -> None:
    comm, splits = _comm(site)
    meta = gu.inherited(site.node, offer.exchange.label)
    y, saved = splice(lambda x, *given: offer.forward(x, comm(given)), [_input(site), *splits], site.node, _first_wait(site), meta)
    _replace(site, y)
    if backward is not None:
        _rewrite_backward(offer, _site(backward), backward.exchange, saved)
    elif site.local_gradient is not None:
        gradient, users = site.local_gradient
        first = next(node for node in gradient.graph.nodes if node in users)
        meta = gu.inherited(site.node, f"{offer.exchange.label} backward")
        masked = splice(lambda dy, *kept: offer.local_backward(dy, kept), [gradient, *saved], first, first, meta)
        for user in users:
            user.replace_input_with(gradient, masked)


def _rewrite_backward(offer: RowOffer, site: Site, exchange: Exchange, saved: Sequence[fx.Node]) -> None:
    comm, splits = _comm(site)
    count = len(saved)

    def run(dy: Tensor, *given: Any) -> Tensor:
        return offer.backward(dy, given[:count], comm(given[count:]))

    meta = gu.inherited(site.node, exchange.label)
    _replace(site, splice(run, [_input(site), *saved, *splits], site.node, _first_wait(site), meta))


def _comm(site: Site) -> tuple[Callable[[Sequence[Any]], Comm], list[fx.Node]]:
    """Returns a function that makes the Comm of ``site`` from the values of its symbolic splits, and the nodes of these splits."""
    if is_device_copy(site.node):
        return lambda _: DeviceComm("", site.group_size, device=site.node.meta["val"].device), []
    group = gu.argument(site.node, "group_name")
    received, sent = (gu.optional_argument(site.node, f"{side}_split_sizes") for side in ("output", "input"))
    if received is None:
        return lambda _: Comm(group, site.group_size), []
    nodes = [split for split in (*received, *sent) if isinstance(split, fx.Node)]

    def make(values: Sequence[Any]) -> Comm:
        known = dict(zip(nodes, values, strict=True))
        return Comm(group, site.group_size, tuple([known.get(split, split) for split in side] for side in (received, sent)))  # type: ignore[arg-type]

    return make, nodes


def _input(site: Site) -> fx.Node:
    """Returns the present input of the collective: the rewriting of another site may have replaced the analysed one."""
    node = site.node.args[0]
    assert isinstance(node, fx.Node), "the plan leaves sites without a known input dense"
    return node


def _first_wait(site: Site) -> fx.Node:
    return gu.waits(site.node)[0]


def _replace(site: Site, result: fx.Node) -> None:
    """Lets ``result`` stand for the waited result. Removes the wait before the collective, since both have side effects."""
    _move_queries(site, result)
    graph = site.node.graph
    for node in dict.fromkeys([*gu.waits(site.node), site.node]):
        if node is not site.node or is_device_copy(node):
            node.replace_all_uses_with(result)
        graph.erase_node(node)


def _move_queries(site: Site, result: fx.Node) -> None:
    """Lets questions about the shape of the result ask ``result``. They, and what depends on them, move to the wait: behind ``result``."""
    node, wait = site.node, _first_wait(site)
    late = {user for user in node.users if user.target in gu.METADATA_OPS}
    if not late:
        return
    for query in late:
        query.replace_input_with(node, result)
    for current in takewhile(lambda other: other is not wait, dropwhile(lambda other: other is not node, list(node.graph.nodes))):
        if current in late or any(source in late for source in current.all_input_nodes):
            late.add(current)
            wait.prepend(current)
