"""Finds the gradient of a collective's input where no collective brings it: the backward of a row-parallel layer sends nothing."""

from torch import fx

from dct_compile.passes import graph_utils as gu


def local_gradient(node: fx.Node, collective: fx.Node, backward: set[fx.Node]) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Returns the gradient of ``node`` and its users, if all of it comes from ``collective``: the backward of ``node``'s own producer.

    The producer's operators, forward and backward, share its sequence number. ``None`` where the gradient is not certain.
    """
    seq, expected = node.meta.get("seq_nr"), gu.value(node)
    if seq is None or expected is None:
        return None
    own = {other for other in node.graph.nodes if other.meta.get("seq_nr") == seq}
    if not leads_only_to(collective, own - backward, own | backward):
        return None
    incoming = {source for user in own & backward for source in user.all_input_nodes if source in backward - own}
    incoming = {source for source in incoming if gu.value(source) is not None}  # a size is no gradient
    if len(incoming) != 1:
        return None
    gradient = incoming.pop()
    actual = gu.value(gradient)
    if actual is None or actual.shape != expected.shape:
        return None
    return gradient, tuple(user for user in gradient.users if user in own)


def leads_only_to(collective: fx.Node, producers: set[fx.Node], within: set[fx.Node]) -> bool:
    """Returns True if nothing but ``collective`` uses what ``producers`` compute, the nodes ``within`` and results of the graph left out.

    Otherwise other branches have a part in the gradient, or all of it, where autograd does not record the collective.
    """
    users = {user for producer in producers - {collective} for user in producer.users if user.target not in gu.METADATA_OPS}
    return all(user is collective or (user in within and user.op != "output") for user in users)
