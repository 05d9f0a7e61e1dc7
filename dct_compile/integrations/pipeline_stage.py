"""Encodes the messages of one pipeline stage: the methods by which a schedule asks for them are wrapped, on this one object.

::

    ops = stage.get_fwd_send_ops(0)     a send of the output            ==>   a send of its codes
    ops = stage.get_fwd_recv_ops(0)     a receive into a buffer         ==>   a receive of codes
    stage.forward_one_chunk(0)          runs on the buffer              ==>   runs on the rows of the codes

Gradients travel alike. Which messages there are, their order and their peers stay those of torch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dct_compile.exchange import ACTIVATION, BACKWARD_OF
from dct_compile.integrations.pipeline_agreement import Pipeline
from dct_compile.integrations.pipeline_edges import (
    Edge,
    input_gradients_sent,
    inputs_received,
    output_gradients_received,
    outputs_sent,
    places,
)
from dct_compile.integrations.pipeline_plan import MessageOffer, decide_message, offer_of, publish_messages
from dct_compile.passes.decision import Decision
from dct_compile.report import ReportEntry

if TYPE_CHECKING:
    from torch.distributed.pipelining.stage import _PipelineStageBase, _RecvInfo

_FORWARD, _BACKWARD = ACTIVATION, BACKWARD_OF[ACTIVATION]
Arriving = list[tuple["_RecvInfo", Tensor, MessageOffer]]
"""Messages that are under way: the place that the rows belong to, the codes, and how they are decoded."""


class StageCompressor:
    """Wraps the methods of ``stage``, a part of ``pipeline``.

    ``reason``: the reason why all messages of this step are dense, ``None`` where they are encoded.
    """

    def __init__(self, stage: "_PipelineStageBase", pipeline: Pipeline) -> None:
        self.stage, self.pipeline = stage, pipeline
        self.reason = pipeline.reason
        self._is_watched = self._has_posted = False
        self._arriving: dict[tuple[str, int], Arriving] = {}
        self._decisions: dict[Any, Decision] = {}
        self._entries: dict[tuple[str, bool], tuple[list[Decision], ReportEntry]] = {}

    def attach(self) -> None:
        """Wraps the methods, from the next call on."""
        wrappers: dict[str, Callable[..., Any]] = {
            "clear_runtime_states": self._begin_step,
            "forward_one_chunk": self._forward,
            "backward_one_chunk": self._backward,
            "get_fwd_send_ops": partial(self._send, _FORWARD),
            "get_bwd_send_ops": partial(self._send, _BACKWARD),
            "get_fwd_recv_ops": partial(self._receive, _FORWARD),
            "get_bwd_recv_ops": partial(self._receive, _BACKWARD),
        }
        for name, wrapper in wrappers.items():
            setattr(self.stage, name, partial(wrapper, getattr(self.stage, name)))

    def _begin_step(self, clear: Callable[[], None]) -> None:
        """Is what a schedule calls first in every step, for each of its stages."""
        self._arriving.clear()
        self.pipeline.begin_step()
        self.reason, self._is_watched = self.pipeline.reason, True
        clear()

    def _forward(self, forward: Callable[..., Any], chunk: int, *args: Any, **kwargs: Any) -> Any:
        # Only in a step that was seen from its start: other stages may have looked already.
        if self._is_watched and not self._has_posted and self._is_told_of_the_end():
            self.pipeline.post(self.stage.stage_index)
            self._has_posted = True
        self._decode(_FORWARD, chunk)
        return forward(chunk, *args, **kwargs)

    def _is_told_of_the_end(self) -> bool:
        """Whether a gradient comes to this stage, or the loss is computed here: only then it knows that the others have run."""
        stage = self.stage
        return stage.has_backward and (stage.is_last or bool(places(stage.grad_recv_info.get(0, ()))))

    def _backward(self, backward: Callable[..., Any], chunk: int, *args: Any, **kwargs: Any) -> Any:
        if self._is_watched and self.stage.has_backward:
            self.pipeline.look()
        self._decode(_BACKWARD, chunk)
        return backward(chunk, *args, **kwargs)

    @torch.no_grad()
    def _send(self, direction: str, send_ops: Callable[[int], list[dist.P2POp]], chunk: int) -> list[dist.P2POp]:
        ops = send_ops(chunk)
        if not ops:
            return ops
        edges = outputs_sent(self.stage) if direction == _FORWARD else input_gradients_sent(self.stage)
        decisions = self._decide(direction, ops, edges)
        for op, decision in zip(ops, decisions, strict=True):
            if (offer := offer_of(decision)) is not None:
                op.tensor = offer.encode(op.tensor)
        self._report(direction, decisions)
        return ops

    @torch.no_grad()
    def _receive(self, direction: str, recv_ops: Callable[[int], list[dist.P2POp]], chunk: int) -> list[dist.P2POp]:
        ops, stage = recv_ops(chunk), self.stage
        if self.reason is not None or not ops:
            return ops
        edges = inputs_received(stage) if direction == _FORWARD else output_gradients_received(stage)
        infos = places((stage.args_recv_info if direction == _FORWARD else stage.grad_recv_info)[chunk])
        arriving: Arriving = []
        for op, info, decision in zip(ops, infos, self._decide(direction, ops, edges), strict=True):
            if (offer := offer_of(decision)) is not None:
                op.tensor = offer.payload_for(op.tensor)
                arriving.append((info, op.tensor, offer))
        self._arriving[direction, chunk] = arriving
        return ops

    @torch.no_grad()
    def _decode(self, direction: str, chunk: int) -> None:
        """Puts the rows of the codes that have arrived where torch looks for them."""
        for info, payload, offer in self._arriving.pop((direction, chunk), []):
            assert info.buffer is not None
            info.buffer = offer.decode(payload, info.buffer)

    def _decide(self, direction: str, ops: Sequence[dist.P2POp], edges: Sequence[Edge]) -> list[Decision]:
        """Decides about the messages of one microbatch, in the way of ``edges`` or against it."""
        pipe, trains, decisions = self.pipeline, self.stage.has_backward, []
        for op, edge in zip(ops, edges, strict=True):
            key = (edge, direction, op.tensor.shape, op.tensor.dtype, trains, self.reason)
            if key not in self._decisions:
                self._decisions[key] = decide_message(op.tensor, edge, direction, pipe, trains, self.reason)
            decisions.append(self._decisions[key])
        return decisions

    def _report(self, direction: str, decisions: list[Decision]) -> None:
        """Reports what is sent for each microbatch, where that is not what was reported before."""
        place = (direction, self.stage.has_backward)
        known, entry = self._entries.get(place, ([], None))
        if decisions == known:
            return
        reports, pipe, stage = self.pipeline.runtime.reports, self.pipeline, self.stage
        if entry is not None:
            reports.remove(entry)
        title = f"stage {stage.stage_index} of {stage.num_stages}, {'outputs' if direction == _FORWARD else 'gradients'}"
        entry = publish_messages(title, decisions, stage, len(stage.args_recv_info), pipe)
        self._entries[place] = (decisions, entry)
