"""What ``dct advise`` says, as plain values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dct_compile.advice import GRADIENT_SCHEMES, METHODS, ROWS, Sent, Training, measured_compute_s
from dct_compile.cli.asked import TargetError
from dct_compile.cli.targets import Target
from dct_compile.compiler.options import read_options
from dct_compile.exchange import GRADIENT
from dct_compile.inspection import inspected
from dct_compile.link import ETHERNET_LATENCY_S, Link, rate
from dct_compile.passes.decision import Decision
from dct_compile.phases import phases_of
from dct_compile.traffic import Traffic

KINDS = {"gradients": (GRADIENT,), "activations and embeddings": ROWS}
TRAFFICS = {"gradients": "gradients", "activations and embeddings": "rows", "other": "other"}
"""The parts of :class:`Sent`, by the words of the table."""
RANKS = tuple(2**power for power in range(1, 11))
LATE = "dct, arrival late"
_WORTH_WHILE = 0.05
"""The part of a step that has to be saved, for the backend to be advised: predictions are not better than that."""


@dataclass(frozen=True)
class Case:
    """A training on a link of ``ranks`` ranks. ``timed``: whether its computation was timed here. ``notes``: of the report."""

    target: str
    training: Training
    link: Link
    ranks: int
    is_measured: bool
    timed: bool
    notes: tuple[str, ...]

    def step_s(self, method: str, link: Link | None = None, ranks: int | None = None) -> float:
        """Returns the seconds of a step; ``method`` may be :data:`LATE`."""
        late = method == LATE
        return self.training.step_s("dct" if late else method, link or self.link, ranks, late=late)

    def sent(self) -> dict[str, Sent]:
        """Returns the work of a step by method."""
        return {method: self.training.sent(method, self.link) for method in METHODS}

    def seconds(self, traffic: Traffic) -> float:
        """Returns the seconds that ``traffic`` takes on the link."""
        return self.training.seconds(traffic, self.link)

    def at_rate(self, bytes_per_s: float) -> Link:
        """Returns a link of another rate, with the latency of this one, or of Ethernet where this one is no link between machines."""
        return replace(self.link, bytes_per_s=bytes_per_s, latency_s=self.link.latency_s or ETHERNET_LATENCY_S)

    def crossing(self, kind: str) -> float:
        """Returns the bytes per second up to which something of ``kind`` is compressed."""
        return self.training.crossing(self.at_rate(1.0), KINDS[kind])


def prepare(found: Target, options: Mapping[str, Any], compute_s: float | None, link: Link, name: str, *, is_measured: bool) -> Case:
    """Compiles the target without running it, and times it where ``compute_s`` is not given. Needs a process group.

    Raises:
        TargetError: The computation cannot be timed.
        Exception: Any error that the model raises.
    """
    # Without a link, so that every scheme makes its offer. The plan decides anew for each link.
    report, decisions = inspected(found.model, found.inputs, found.named_inputs, {**options, "link": None})
    timed = compute_s is None
    seconds = _timed(found, decisions) if compute_s is None else compute_s
    config = phases_of(read_options(options)[0])[-1].config
    training = Training(decisions, config, seconds, _device_of(found))
    return Case(name, training, link, dist.get_world_size(), is_measured, timed, report.notes)


def _timed(found: Target, decisions: Sequence[Decision]) -> float:
    if dist.get_backend() != "fake" and any(decision.exchange.kind in ROWS for decision in decisions):
        raise TargetError("the model exchanges activations, which between real ranks would be timed with its computation: give --compute")
    try:
        return measured_compute_s(found.model, found.inputs, found.named_inputs)
    except ValueError as error:
        raise TargetError(f"forward and backward cannot be timed: {error} (--compute)") from error


def _device_of(found: Target) -> str:
    tensors = [leaf for leaf in pytree.tree_leaves((found.inputs, found.named_inputs)) if isinstance(leaf, Tensor)]
    tensors += list(found.model.parameters()) if isinstance(found.model, nn.Module) else []
    return "cuda" if any(tensor.is_cuda for tensor in tensors) else "cpu"


def recommended(case: Case) -> tuple[dict[str, Any] | None, str]:
    """Returns the options to set (``None``: leave it dense), and why."""
    decisions = case.training.decided(case.link)
    if not decisions:
        return None, "nothing is sent"
    if not any(decision.compressed for decision in decisions):
        reasons = dict.fromkeys(decision.reason for decision in decisions if decision.exchange.kind in (GRADIENT, *ROWS))
        return None, "; ".join(reasons) or "no gradient, activation or embedding is sent"
    dense_s, fp16_s, dct_s = (case.step_s(method) for method in METHODS)
    if dct_s > (1 - _WORTH_WHILE) * dense_s:
        return None, f"a step would be shorter by {1 - dct_s / dense_s:.1%} only: the computation takes most of it"
    if dct_s > (1 - _WORTH_WHILE) * fp16_s:
        return None, f"torch's fp16 hook brings a step to {fp16_s / dense_s:.0%} of dense, DCT to {dct_s / dense_s:.0%}: take the hook"
    why = f"a step takes {dct_s / dense_s:.0%} of dense, {fp16_s / dense_s:.0%} with torch's fp16 hook"
    return ({} if case.is_measured else {"link": _as_option(case.link)}), why


def _as_option(link: Link) -> str | dict[str, float]:
    if link == Link(link.bytes_per_s):
        return rate(link.bytes_per_s).replace(" ", "")
    return link.numbers()


def at_scale(case: Case) -> dict[int, dict[str, Traffic]]:
    """Returns the work for gradients in one step, by data-parallel ranks and by method; "auto" is what the plan takes on this link."""
    training, link = case.training, case.link
    rows = {}
    for ranks in RANKS:
        sent = {method: training.sent(method, None, ranks).gradients for method in ("dense", *GRADIENT_SCHEMES)}
        rows[ranks] = {**sent, "auto": training.sent("dct", link, ranks).gradients}
    return rows


def values(case: Case) -> dict[str, Any]:
    """Returns all numbers as JSON holds them. A crossing that does not exist is ``None``."""
    options, why = recommended(case)
    crossings = {kind: case.crossing(kind) for kind in KINDS}
    by_kind = {
        kind: {method: _traffic(case, getattr(sent, part)) for method, sent in case.sent().items()} for kind, part in TRAFFICS.items()
    }
    scale = {
        ranks: {method: _traffic(case, traffic) for method, traffic in row.items()}
        for ranks, row in (at_scale(case) if case.training.data_parallel_ranks > 1 else {}).items()
    }
    return {
        "target": case.target,
        "ranks": case.ranks,
        "link": _as_option(case.link) if math.isfinite(case.link.bytes_per_s) else "one machine",
        "link_measured": case.is_measured,
        "compute_s": case.training.compute_s,
        "compute_timed": case.timed,
        "traffic": by_kind,
        "step_s": {method: case.step_s(method) for method in (*METHODS, LATE)},
        "crossing_bytes_per_s": {kind: value if math.isfinite(value) else None for kind, value in crossings.items()},
        "state_bytes": case.training.state_bytes(case.link),
        "options": options,
        "why": why,
        "scale": scale,
        "notes": list(case.notes),
    }


def _traffic(case: Case, traffic: Traffic) -> dict[str, float]:
    assert isinstance(traffic.wire, Fraction)
    return {"messages": traffic.messages, "bytes": traffic.wire_bytes, "seconds": case.seconds(traffic)}
