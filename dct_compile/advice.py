"""Predicts one training step: what a rank sends and how long that takes, for any link and any number of data-parallel ranks.

The numbers are those that the plan decides by. The exchanges come from a compilation that runs nothing. For another link or another number
of ranks, the plan decides about them anew.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from dct_compile.buckets import SmallerBuckets, smaller_buckets
from dct_compile.config import DCTConfig
from dct_compile.exchange import BACKWARD_OF, GRADIENT, Exchange
from dct_compile.inspection import undisturbed
from dct_compile.link import ONE_MACHINE, Link
from dct_compile.passes.decision import Decision, dense
from dct_compile.passes.plan import decide, follow_forward
from dct_compile.schemes import SCHEMES, GradientOffer, Offer
from dct_compile.traffic import NOTHING, Traffic

BACKWARD_SHARE = 2 / 3
"""The part of the computation that is the backward: its two products of matrices per layer, against one of the forward."""
METHODS = ("dense", "fp16", "dct")
"""Inductor alone, torch's hook for DDP that sends gradients as float16, and backend "dct"."""
GRADIENT_SCHEMES = ("gather", "owner", "powersgd", "random_k")
ROWS = (*BACKWARD_OF, *BACKWARD_OF.values())
"""The kinds of exchanges that carry activations and embeddings, forward and backward."""
_SLOWEST, _FASTEST = 1e2, 1e14
"""Bytes per second between which a crossing is looked for."""
_RUNS = 5


@dataclass(frozen=True)
class Sent:
    """The work of one rank in one training step: for gradients, for activations and embeddings, and for all else.

    ``last``: the part of ``gradients`` that is ready when the backward has ended.
    """

    gradients: Traffic = NOTHING
    rows: Traffic = NOTHING
    other: Traffic = NOTHING
    last: Traffic = NOTHING

    @property
    def total(self) -> Traffic:
        return self.gradients + self.rows + self.other

    def step_s(self, link: Link, compute_s: float, *, late: bool = False) -> float:
        """Returns the seconds of a step that computes for ``compute_s``. ``late``: whether gradients arrive in the next step."""
        blocking_s, gradients_s = (self.rows + self.other).seconds(link), self.gradients.seconds(link)
        if late:
            return late_step_seconds(compute_s, blocking_s, gradients_s)
        return step_seconds(compute_s, blocking_s, gradients_s, self.last.seconds(link))


def step_seconds(compute_s: float, blocking_s: float, gradients_s: float, last_s: float) -> float:
    """Returns the seconds of a training step.

    Activations and embeddings are waited for where they are needed. Gradients are sent while the backward computes the next ones. Those of
    the last bucket are ready at its end, so nothing hides them::

        step = compute + blocking + last + max(0, gradients - last - 2/3 compute)

    Args:
        compute_s: Seconds that forward and backward compute; two thirds of them are the backward.
        blocking_s: Seconds of the exchanges that are waited for at once.
        gradients_s: Seconds of all gradients.
        last_s: Seconds of the last bucket, a part of ``gradients_s``.
    """
    return compute_s + blocking_s + last_s + max(0.0, gradients_s - last_s - BACKWARD_SHARE * compute_s)


def late_step_seconds(compute_s: float, blocking_s: float, gradients_s: float) -> float:
    """Returns the seconds of a step whose gradients arrive one step late, so that a whole step hides them: the longer of both."""
    return max(compute_s + blocking_s, gradients_s)


@dataclass(frozen=True)
class Training:
    """A training, as one step of it is predicted.

    ``decisions``: about all that a step sends, one for each call, as the bytes decide. ``config``: the options. ``compute_s``: seconds of
    forward and backward without communication. ``device``: "cpu" or "cuda", where kernels run.
    """

    decisions: Sequence[Decision]
    config: DCTConfig
    compute_s: float
    device: str = "cpu"

    @cached_property
    def data_parallel_ranks(self) -> int:
        """Copies of the model: the size of the smallest group that averages gradients, 1 where none does."""
        return min((decision.exchange.ranks for decision in self.decisions if decision.exchange.kind == GRADIENT), default=1)

    def exchanges(self, ranks: int | None = None) -> list[Exchange]:
        """Returns the exchanges of a step. ``ranks``: the number of copies of the model, ``None`` for what it is.

        A group that averages gradients has as many ranks for each copy as before. Groups that exchange activations stay as they are.
        """
        found = [decision.exchange for decision in self.decisions]
        if ranks is None:
            return found
        own = self.data_parallel_ranks
        return [replace(item, ranks=item.ranks * ranks // own, rank=0) if item.kind == GRADIENT else item for item in found]

    def decided(self, link: Link | None, ranks: int | None = None) -> list[Decision]:
        """Returns the plan's decisions on ``link``; ``None`` lets the bytes decide."""
        link = self._with_rates(link) if link is not None else None
        decisions: list[Decision] = []
        for exchange, known in zip(self.exchanges(ranks), self.decisions, strict=True):
            pairs = decisions if exchange.kind in BACKWARD_OF.values() else []
            forward = next((decision for decision in pairs if decision.exchange.backward == exchange), None)
            if forward is not None:
                decisions.append(follow_forward(exchange, forward))
            elif known.compressed or known.offers:
                decisions.append(decide(exchange, self.config, lambda _: link))
            else:
                decisions.append(dense(exchange, known.reason))
        return decisions

    def sent(self, method: str, link: Link | None = None, ranks: int | None = None) -> Sent:
        """Returns the work of one step.

        Args:
            method: One of :data:`METHODS`, or a scheme of :data:`GRADIENT_SCHEMES` that carries each gradient for which it makes an offer,
                be it cheaper or not.
            link: The link on which "dct" decides; ``None`` lets the bytes decide.
            ranks: The number of copies of the model, ``None`` for what it is.
        """
        if method == "dct":
            decisions = self.decided(link, ranks)
            return _sum([decision.exchange for decision in decisions], [decision.traffic for decision in decisions])
        exchanges = self.exchanges(ranks)
        if method == "dense":
            return _sum(exchanges, [exchange.dense_traffic for exchange in exchanges])
        if method == "fp16":
            return _sum(exchanges, [fp16_traffic(exchange) for exchange in exchanges])
        config = replace(self.config, gradient_scheme=method)
        open_ = [decision.compressed or bool(decision.offers) for decision in self.decisions]
        return _sum(exchanges, [_offered(one, method, config, can) for one, can in zip(exchanges, open_, strict=True)])

    def step_s(self, method: str, link: Link, ranks: int | None = None, *, late: bool = False) -> float:
        """Returns the seconds of one step."""
        return self.sent(method, link, ranks).step_s(self._with_rates(link), self.compute_s, late=late)

    def seconds(self, traffic: Traffic, link: Link) -> float:
        """Returns the seconds that ``traffic`` takes on ``link``."""
        return traffic.seconds(self._with_rates(link))

    def smaller_buckets(self, link: Link) -> SmallerBuckets | None:
        """Returns the buckets of gradients that would save time on ``link``, if any would."""
        gradients = [decision for decision in self.decided(link) if decision.exchange.kind == GRADIENT]
        sizes, traffics = [item.exchange.segment_bytes for item in gradients], [item.traffic for item in gradients]
        return smaller_buckets(link, sizes, traffics)

    def crossing(self, link: Link, kinds: Sequence[str]) -> float:
        """Returns the largest rate at which an exchange of one of ``kinds`` is compressed, with the latency of ``link``.

        Returns:
            Bytes per second, within one percent; 0 where nothing is compressed at any rate, infinity where something always is.
        """

        def compresses(bytes_per_s: float) -> bool:
            decisions = self.decided(replace(link, bytes_per_s=bytes_per_s))
            return any(decision.compressed and decision.exchange.kind in kinds for decision in decisions)

        slow, fast = _SLOWEST, _FASTEST
        if not compresses(slow) or compresses(fast):
            return math.inf if compresses(fast) else 0.0
        while fast > 1.01 * slow:
            middle = math.sqrt(slow * fast)
            slow, fast = (middle, fast) if compresses(middle) else (slow, middle)
        return slow

    def state_bytes(self, link: Link | None) -> dict[str, int]:
        """Returns the bytes of the state that the compressed gradients keep, by tensor, and of its copy for ``undo_discarded``."""
        specs = [decision.offer.state for decision in self.decided(link) if isinstance(decision.offer, GradientOffer)]
        sizes: dict[str, int] = {}
        for tensor in (tensor for spec in specs for tensor in spec.tensors):
            name = tensor.input_name.replace("_", " ")
            sizes[name] = sizes.get(name, 0) + math.prod(tensor.shape) * tensor.dtype.itemsize
        if sizes and self.config.undo_discarded and self.config.error_feedback:
            sizes["copy for undo_discarded"] = sum(sizes.values())
        return sizes

    def _with_rates(self, link: Link) -> Link:
        return link if link == ONE_MACHINE else link.on(self.device)


def fp16_traffic(exchange: Exchange) -> Traffic:
    """Returns the traffic with torch's fp16 hook, which casts the gradients of DDP; all else is dense."""
    if exchange.kind != GRADIENT or exchange.dtype is None or exchange.dtype.itemsize <= 2:
        return exchange.dense_traffic
    numel, half = exchange.input_bytes // exchange.dtype.itemsize, torch.float16.itemsize
    casts = 2 * (exchange.dtype.itemsize + half) * numel
    return exchange.collective.sent(half * numel, exchange.ranks).passing_over(casts)


def measured_compute_s(model: Callable[..., Any], inputs: tuple[Any, ...], named_inputs: Mapping[str, Any]) -> float:
    """Runs forward and backward uncompiled, a few times, and returns the median of their seconds. Nothing is sent or changed.

    Raises:
        ValueError: No result of ``model`` has a gradient, or it is on the device "meta".
        Exception: Any error that ``model`` raises.
    """
    seconds = []
    with undisturbed(model, (inputs, named_inputs)) as plain, torch.enable_grad():
        for _ in range(_RUNS + 1):
            start = time.perf_counter()
            leaves = pytree.tree_leaves(plain(*inputs, **named_inputs))
            results = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not results:
                raise ValueError("no result of the model has a gradient, so there is no backward to time: give the seconds of a step")
            if any(result.is_meta for result in results):
                raise ValueError("the model is on the device 'meta', where nothing is computed: give the seconds of a step")
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])
            if any(result.is_cuda for result in results):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one allocates


def _offered(exchange: Exchange, name: str, config: DCTConfig, can_be_compressed: bool) -> Traffic:
    """Returns the traffic of the scheme ``name`` for a gradient, the dense one where it makes no offer."""
    if exchange.kind != GRADIENT or not can_be_compressed:
        return exchange.dense_traffic
    made = next(scheme.ask(exchange, config) for scheme in SCHEMES if scheme.name == name)
    return made.traffic if isinstance(made, Offer) else exchange.dense_traffic


def _sum(exchanges: Sequence[Exchange], traffics: Sequence[Traffic]) -> Sent:
    """Adds up the traffic of each exchange; the last gradient is that of the last bucket."""
    sums = {"gradients": NOTHING, "rows": NOTHING, "other": NOTHING, "last": NOTHING}
    for exchange, traffic in zip(exchanges, traffics, strict=True):
        name = "gradients" if exchange.kind == GRADIENT else "rows" if exchange.kind in ROWS else "other"
        sums[name] += traffic
        if name == "gradients":
            sums["last"] = traffic
    return Sent(**sums)
