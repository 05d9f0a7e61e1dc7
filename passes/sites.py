"""Finds every collective of a graph and describes its input. Changes no graph."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from dct_compile.element_order import ElementOrder
from dct_compile.exchange import (
    ACTIVATION,
    ALL_REDUCE,
    BACKWARD_OF,
    COMPUTED,
    EMBEDDING,
    FOREIGN,
    GRADIENT,
    OTHER,
    PARAMETER,
    UNKNOWN,
    Collective,
    Parameter,
    Segment,
)
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.collectives import DEVICE_COPY, GATHER, collective_of
from dct_compile.passes.destination import destination, read_results
from dct_compile.passes.local_gradient import leads_only_to, local_gradient
from dct_compile.passes.origin import origin
from dct_compile.passes.source import source_name

aten = gu.aten
_PERMUTATIONS = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})
_GRADIENT_PATH = gu.SCALING_OPS | {
    *_PERMUTATIONS,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}


@dataclass
class GraphContext:
    """The meaning of a graph's inputs and outputs, made by whoever traced the graph.

    ``parameters``: the placeholders that stand for parameters. ``gradients``: which positions of the output are the gradients of which
    parameters. ``foreign``: inputs that another part of the model computed (after a graph break, or where DDP's optimizer cut the graph).
    ``tangents``: the inputs of the backward part. ``training``: False for a graph that has no backward. ``segments``: the layout of
    gradient buffers, by their all_reduce. ``backward_only``: True for a backward that compiled autograd traced on its own. ``results``:
    which positions of the output are returned, and which are new values of inputs, by the destinations of
    :class:`dct_compile.exchange.Exchange`. ``written``: the placeholders that are written to.
    """

    training: bool
    parameters: dict[fx.Node, Parameter] = field(default_factory=dict)
    gradients: dict[int, Parameter] = field(default_factory=dict)
    foreign: set[fx.Node] = field(default_factory=set)
    tangents: list[fx.Node] = field(default_factory=list)
    segments: dict[fx.Node, tuple[Segment, ...]] = field(default_factory=dict)
    backward_only: bool = False
    results: dict[int, str] = field(default_factory=dict)
    written: set[fx.Node] = field(default_factory=set)


@dataclass
class Site:
    """One collective of a graph: the node that starts it, and its facts from the graph (see :class:`dct_compile.exchange.Exchange`).

    ``input``: the node of its one input. ``twin``: the forward site of a backward one. ``local_gradient``: for a forward all_reduce
    without a backward collective (row-parallel layers), the gradient of its input and the nodes that use it as such, if all of it comes
    from this site. ``destination``: of a
    forward site's result. ``operator``: the higher-order operator in whose subgraph the node stands.
    """

    node: fx.Node
    collective: Collective
    kind: str
    origin: str
    name: str
    input: fx.Node | None
    group_name: str
    group_size: int
    group_rank: int
    twin: "Site | None" = None
    segments: tuple[Segment, ...] = ()
    local_gradient: tuple[fx.Node, tuple[fx.Node, ...]] | None = None
    destination: str = COMPUTED
    operator: str = ""

    @property
    def tensor(self) -> Tensor | None:
        """The fake input tensor; ``None`` where there is none or there are several."""
        return gu.value(self.input) if self.input is not None else None


def find_sites(graph: fx.Graph, context: GraphContext) -> list[Site]:
    """Finds all collectives of ``graph``, forward and backward.

    Args:
        graph: A joint graph of forward and backward, or a forward or backward alone.
        context: The meaning of the graph's inputs and outputs.

    Returns:
        The sites, in graph order. A backward site has the site of its forward as ``twin``.
    """
    backward = gu.reachable_from(context.tangents)
    outputs = gu.outputs(graph)
    returned = {outputs[position]: parameter for position, parameter in context.gradients.items()}
    sites: list[Site] = []
    forward_by_seq: dict[int, Site] = {}
    before: dict[int, set[fx.Node]] = {}  # forward nodes by sequence number: what autograd does not record has that of another operator
    for node in graph.nodes:
        seq = node.meta.get("seq_nr")
        if node not in backward and seq is not None:
            before.setdefault(seq, set()).add(node)
        collective = collective_of(node)
        if collective is None:
            continue
        site = _site(node, collective, context, returned)
        forward = forward_by_seq.get(seq) if node in backward else None
        if forward is not None and forward.kind in BACKWARD_OF:
            site.segments = ()
        if site.segments:
            site.kind, site.name = GRADIENT, ", ".join(segment.parameter.name for segment in site.segments)
        elif context.backward_only:
            is_gradient = collective.name.startswith("all_reduce")
            site.kind, site.origin = (GRADIENT, site.origin) if is_gradient else (BACKWARD_OF[ACTIVATION], FOREIGN)
        elif node in backward:
            site.twin = forward_by_seq.pop(seq, None) if seq is not None else None
            site.kind = BACKWARD_OF[site.twin.kind if site.twin is not None and site.twin.kind in BACKWARD_OF else ACTIVATION]
            if site.twin is not None:
                site.name = site.twin.name
        elif site.origin == EMBEDDING or (site.origin == PARAMETER and collective == GATHER and _is_float(site)):
            site.kind = site.origin  # these origins are kinds, too
        elif _is_float(site) and site.origin != PARAMETER:
            site.kind = ACTIVATION
        if node not in backward and seq is not None and leads_only_to(node, before[seq], before[seq] | backward):
            forward_by_seq.setdefault(seq, site)
        sites.append(site)
    _pair_by_gradient(sites, backward)
    results = read_results(graph, context.results, {*context.parameters, *context.written})
    for site in sites:
        if site.kind in BACKWARD_OF:
            site.destination = destination(site.node, results)
    return sites


def _site(node: fx.Node, collective: Collective, context: GraphContext, returned: dict[Any, Parameter]) -> Site:
    first = node.args[0] if node.args else None
    tensor = first if isinstance(first, fx.Node) else None
    group_name, group_size, group_rank = _group(node, collective)
    return Site(
        node,
        collective,
        kind=OTHER,
        origin=origin(tensor, context.parameters, context.foreign) if tensor is not None else UNKNOWN,
        name=source_name(node),
        input=tensor,
        group_name=group_name,
        group_size=group_size,
        group_rank=group_rank,
        segments=context.segments.get(node) or _gradient_segments(node, returned),
    )


def _group(node: fx.Node, collective: Collective) -> tuple[str, int, int]:
    """Returns name, size and own rank of the group of a collective. Two devices of one process are a group without a name."""
    if collective is DEVICE_COPY:
        return "", 2, 0
    group = gu.process_group(node)
    return (group.group_name, group.size(), group.rank()) if group is not None else ("unknown", dist.get_world_size(), dist.get_rank())


def _pair_by_gradient(sites: list[Site], backward: set[fx.Node]) -> None:
    """Pairs sites that sequence numbers do not pair: by the gradient of a forward's input, where a backward site computes it."""
    unpaired = {wait: site for site in sites if site.kind in BACKWARD_OF.values() and site.twin is None for wait in gu.waits(site.node)}
    paired = {id(site.twin) for site in sites if site.twin is not None}
    for site in sites:
        if site.kind not in BACKWARD_OF or site.input is None or id(site) in paired:
            continue
        found = local_gradient(site.input, site.node, backward)
        if found is not None and found[0] in unpaired:
            twin = unpaired[found[0]]
            twin.twin, twin.kind, twin.name = site, BACKWARD_OF[site.kind], site.name
        elif site.collective.name == ALL_REDUCE:
            site.local_gradient = found


def _is_float(site: Site) -> bool:
    return site.tensor is not None and site.tensor.is_floating_point()


def _gradient_segments(node: fx.Node, returned: dict[Any, Parameter]) -> tuple[Segment, ...]:
    """Returns the parameter whose gradient an all_reduce's result becomes, through scalings and operations that keep every element."""
    for wait in gu.waits(node):
        path = [wait]
        while path[-1] not in returned:
            followers = [user for user in path[-1].users if user.target in _GRADIENT_PATH]
            if len(followers) != 1:
                break
            path.append(followers[0])
        else:
            parameter, gradient = returned[path[-1]], _laid_out(path)
            if gradient is None or gradient.numel() != parameter.numel:
                return ()
            return (Segment(replace(parameter, order=ElementOrder.of(gradient)), 0),)
    return ()


def _laid_out(path: Sequence[fx.Node]) -> Tensor | None:
    """Returns the last node of ``path`` as a view of the first one's buffer, without values; ``None`` where there is no such view."""
    shapes = [[gu.hint(size) for size in value.shape] for node in path if (value := gu.value(node)) is not None]
    if len(shapes) < len(path):
        return None
    view = torch.empty(shapes[0], device="meta")
    for node, shape in zip(path[1:], shapes[1:], strict=True):
        try:
            view = node.target(view, *node.args[1:]) if node.target in _PERMUTATIONS else view.view(shape)
        except RuntimeError:  # its elements do not lie in the order of any dimensions
            return None
    return view
