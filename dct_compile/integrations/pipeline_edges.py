"""Names the edges of a pipeline: which stage each message goes to or comes from, and its number among those between the same two stages.

A tensor and its gradient have the same number, on both ends. Messages are in the order in which torch asks for them.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo


class Edge(NamedTuple):
    """The way of a tensor from the stage ``first`` to the stage ``last``, the ``number``-th between these two."""

    first: int
    last: int
    number: int

    def __str__(self) -> str:
        return f"stage {self.first} to stage {self.last}" + (f", tensor {self.number}" if self.number else "")


def outputs_sent(stage: "_PipelineStageBase") -> list[Edge]:
    """Returns the edges by which the outputs leave ``stage``."""
    return [edge for _, edge in _output_edges(stage)]


def inputs_received(stage: "_PipelineStageBase") -> list[Edge]:
    """Returns the edges by which the inputs come to ``stage``."""
    return [edge for _, edge in _input_edges(stage)]


def input_gradients_sent(stage: "_PipelineStageBase") -> list[Edge]:
    """Returns the edges of those inputs whose gradients ``stage`` sends: an integer has none."""
    # Older versions of torch send all of them.
    expected = getattr(stage, "_get_grad_send_meta", lambda place: place)
    return [edge for place, edge in _input_edges(stage) if expected(place) is not None]


def output_gradients_received(stage: "_PipelineStageBase") -> list[Edge]:
    """Returns the edges of those outputs whose gradients come to ``stage``."""
    edges: dict[int, Edge] = {}
    for place, edge in _output_edges(stage):
        edges.setdefault(place, edge)  # torch takes the gradient of the first one alone
    return [edges[place] for place, info in enumerate(stage.grad_recv_info[0]) if _is_received(info)]


def places(infos: Iterable[Any]) -> "list[_RecvInfo]":
    """Returns those of ``infos`` that are received, not given to the schedule by its caller."""
    return [info for info in infos if _is_received(info)]


def _is_received(info: Any) -> bool:
    # Its buffer does not tell: from torch 2.15 on there is one only while a message is under way.
    return info.tensor_meta is not None and not info.is_root_arg


def _output_edges(stage: "_PipelineStageBase") -> list[tuple[int, Edge]]:
    sent = [(place, peer) for place, peers in stage.act_send_info.items() for peer in peers if peer is not None]
    numbers = _numbers(peer for _, peer in sent)
    return [(place, Edge(stage.stage_index, peer, number)) for (place, peer), number in zip(sent, numbers, strict=True)]


def _input_edges(stage: "_PipelineStageBase") -> list[tuple[int, Edge]]:
    received: list[tuple[int, Any]] = [(place, info.source) for place, info in enumerate(stage.args_recv_info[0]) if _is_received(info)]
    numbers = _numbers(source for _, source in received)
    return [(place, Edge(source, stage.stage_index, number)) for (place, source), number in zip(received, numbers, strict=True)]


def _numbers(peers: Iterable[Any]) -> list[int]:
    """Returns for each of ``peers`` how often it has come before."""
    seen: Counter[Any] = Counter()
    numbers = []
    for peer in peers:
        numbers.append(seen[peer])
        seen[peer] += 1
    return numbers
