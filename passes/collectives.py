"""The table of all collectives. By overload it holds the collective, what carries it when it is encoded, its backward and its traffic.

A collective that has no row here is left alone, with that reason in the report. This holds for operators that a newer torch adds, too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from dct_compile import traffic
from dct_compile.exchange import ALL_GATHER, ALL_TO_ALL, SEND, Collective
from dct_compile.passes.device_copy import is_device_copy
from dct_compile.traffic import Traffic

c10d = torch.ops._c10d_functional

ALL_REDUCE = Collective("all_reduce", True, ALL_GATHER, "all_reduce", traffic.ring_twice)
GATHER = Collective("all_gather_into_tensor", False, ALL_GATHER, "reduce_scatter_tensor", traffic.to_all)
SCATTER = Collective("reduce_scatter_tensor", True, ALL_TO_ALL, "all_gather_into_tensor", traffic.ring_once)
_ENCODED = (
    GATHER,
    SCATTER,
    Collective("all_to_all_single", False, ALL_TO_ALL, "all_to_all_single", traffic.one_share_to_each),
    ALL_REDUCE,
)
"""The collectives that schemes carry."""
BROADCAST = Collective("broadcast", False, "", "", traffic.from_one)
DEVICE_COPY = Collective("device_copy", False, SEND, "device_copy", traffic.once)
"""A copy from one accelerator to another inside of one process."""
MESSAGE = Collective(SEND, False, SEND, SEND, traffic.once)
"""A message from one pipeline stage to another, which an integration encodes."""
_TRAFFIC: dict[str, Callable[[int, int], Traffic]] = {
    "all_reduce": traffic.ring_twice,
    "all_gather": traffic.to_all,
    "reduce_scatter": traffic.ring_once,
    "all_to_all": traffic.one_share_to_each,
    "broadcast": traffic.from_one,
    "irecv": traffic.received,
}
"""The traffic of all others, by the beginning of the name: coalesced, in place, or with an output given."""


def _overloads(collective: Collective) -> Iterator[tuple[Any, Collective]]:
    packet = getattr(c10d, collective.name)
    for name in packet.overloads():
        yield getattr(packet, name), collective


TABLE: dict[Any, Collective] = {overload: row for collective in _ENCODED for overload, row in _overloads(collective)}
"""The collectives that schemes carry, by overload."""

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d")
_NOT_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")
"""Operators of these namespaces that start nothing that carries a tensor; names that begin like the first one wait."""


def collective_of(node: fx.Node) -> Collective | None:
    """Returns the collective that ``node`` starts, ``None`` where it starts none.

    Args:
        node: Any node of a graph.

    Returns:
        The row of :data:`TABLE`, or a collective without a carrier for one that no scheme carries.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    found = TABLE.get(node.target)
    if found is not None or is_device_copy(node):
        return found or DEVICE_COPY
    namespace, _, name = node.target._schema.name.partition("::")
    if namespace not in _NAMESPACES or name.startswith(_NOT_COLLECTIVES):
        return None
    sent = next((count for prefix, count in _TRAFFIC.items() if name.startswith(prefix)), traffic.once)
    return Collective(name, False, "", "", sent)
