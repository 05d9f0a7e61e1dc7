"""Reads the meaning of a joint graph's inputs and outputs from AOTAutograd's descriptors."""

from collections.abc import Sequence

from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, InputMutationAOTOutput, PlainAOTInput

from dct_compile.exchange import RETURNED, STORED, Parameter
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.graph_input import GraphInput
from dct_compile.passes.sites import GraphContext


def has_descriptors(graph: fx.Graph) -> bool:
    """Returns True for a graph that AOTAutograd traced, and False for the subgraph of a higher-order operator."""
    placeholders = gu.placeholders(graph)
    return any("desc" in node.meta for node in placeholders or [gu.output_node(graph)])


def read_context(graph: fx.Graph, inputs: Sequence[GraphInput], backward_only: bool) -> tuple[GraphContext, list[fx.Node]]:
    """Reads the Dynamo input of each placeholder, and the meaning of each output.

    A tensor subclass is several placeholders; DTensor's local tensor is the one that counts.

    Args:
        graph: The joint graph.
        inputs: The inputs of the Dynamo graph.
        backward_only: True for a backward that compiled autograd traced on its own.

    Returns:
        The context, and the placeholders behind those of ``inputs``, in order.
    """
    placeholders = gu.placeholders(graph)
    tangents = gu.tangents(graph)
    context = GraphContext(training=bool(tangents), tangents=tangents, backward_only=backward_only)
    further: list[fx.Node] = []
    for node in placeholders:
        position = _input_position(node.meta.get("desc"))
        if position is None:
            continue
        if position >= len(inputs):
            further.append(node)
            continue
        info, tensor = inputs[position], gu.value(node)
        if info.is_parameter and tensor is not None:
            context.parameters[node] = Parameter(position, info.name, tuple(gu.hint(size) for size in tensor.shape))
        if info.is_foreign:
            context.foreign.add(node)
    _read_outputs(graph, inputs, context)
    return context, further


def _read_outputs(graph: fx.Graph, inputs: Sequence[GraphInput], context: GraphContext) -> None:
    """Adds to ``context`` which outputs are gradients of parameters, which are new values of inputs, and which are returned."""
    known = {parameter.position: parameter for parameter in context.parameters.values()}
    descriptors = gu.output_node(graph).meta.get("desc", ())
    written: set[int | None] = set()
    for place, (result, descriptor) in enumerate(zip(gu.outputs(graph), descriptors, strict=False)):
        innermost = _innermost(descriptor)
        if isinstance(innermost, InputMutationAOTOutput):
            context.results[place] = STORED
            written.add(_input_position(innermost.mutated_input))
        elif not isinstance(innermost, GradAOTOutput):
            context.results[place] = RETURNED
        position = _input_position(getattr(innermost, "grad_of", None))
        if position in known and inputs[position].is_trainable and isinstance(result, fx.Node) and gu.value(result) is not None:
            context.gradients[place] = known[position]
    copied = {node.args[0] for node in graph.find_nodes(op="call_function", target=gu.aten.copy_.default)}
    for node in gu.placeholders(graph):
        position = _input_position(node.meta.get("desc"))
        if node in copied or (position is not None and position in written):
            context.written.add(node)


def _innermost(descriptor: object) -> object:
    """Strips the descriptors of a subclass's parts down to that of the whole."""
    while hasattr(descriptor, "base"):
        descriptor = descriptor.base
    return descriptor


def _input_position(descriptor: object) -> int | None:
    innermost = _innermost(descriptor)
    return innermost.idx if isinstance(innermost, PlainAOTInput) else None
