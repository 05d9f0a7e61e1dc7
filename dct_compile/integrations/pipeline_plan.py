"""Decides about the messages of one pipeline stage, and reports them."""

import weakref
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dct_compile.exchange import ACTIVATION, Exchange
from dct_compile.integrations.pipeline_agreement import Pipeline
from dct_compile.integrations.pipeline_edges import Edge
from dct_compile.passes.collectives import MESSAGE
from dct_compile.passes.decision import Decision, dense
from dct_compile.passes.manager import publish
from dct_compile.passes.plan import decide, matching_rows
from dct_compile.passes.record import describe_site
from dct_compile.reasons import Reason
from dct_compile.report import GraphReport, ReportEntry
from dct_compile.schemes.cast_rows import CastRows
from dct_compile.schemes.quantized_rows import QuantizedRows

MessageOffer = QuantizedRows | CastRows
"""The offers that can encode one message by itself."""


def decide_message(tensor: Tensor, edge: Edge, kind: str, pipeline: Pipeline, trains: bool, reason: str | None) -> Decision:
    """Decides about one message. Both of its ends call this with the same arguments, but for the values of ``tensor``.

    Args:
        tensor: The dense message, or the buffer that receives it.
        edge: Its way.
        kind: "activation" or "activation_gradient".
        pipeline: The pipeline.
        trains: Whether the step has a backward.
        reason: The reason to leave all messages dense, if there is one.

    Returns:
        The decision. An offer is one of "quantized_rows" or "cast_rows".
    """
    group, size = pipeline.group, tensor.numel() * tensor.itemsize
    plain = Exchange(
        MESSAGE, kind, str(edge), tuple(tensor.shape), tensor.dtype, group.group_name, group.size(), group.rank(), size, trains=trains
    )
    if reason is not None:
        return dense(plain, reason)
    decision = decide(replace(plain, kind=ACTIVATION), pipeline.config, lambda _: pipeline.link)
    if decision.offer is not None and not isinstance(decision.offer, MessageOffer):
        return dense(plain, Reason.MESSAGE_CODEC)
    offer = replace(decision.offer, exchange=plain) if decision.offer is not None else None
    return replace(decision, exchange=plain, offer=offer)


def offer_of(decision: Decision) -> MessageOffer | None:
    """Returns the offer of a decision of :func:`decide_message`, ``None`` for dense."""
    offer = decision.offer
    assert offer is None or isinstance(offer, MessageOffer)
    return offer


def publish_messages(title: str, decisions: Sequence[Decision], owner: object, chunks: int, pipeline: Pipeline) -> ReportEntry:
    """Reports what a stage sends in one step.

    Args:
        title: The name of these messages in the report.
        decisions: The decisions about the messages of one microbatch.
        owner: The stage.
        chunks: The number of microbatches.
        pipeline: The pipeline.
    """
    rows = [(describe_site(decision), None) for decision in decisions]
    entry = publish(GraphReport(title, "", ""), rows, pipeline.runtime)
    entry.owner, entry.backwards = weakref.ref(owner), chunks
    entry.training = decisions[0].exchange.trains
    forward = [replace(item, exchange=replace(item.exchange, kind=ACTIVATION)) for item in decisions]
    pipeline.runtime.reports.patterns.look(pipeline.config, rows=matching_rows(forward, pipeline.config))
    return entry
