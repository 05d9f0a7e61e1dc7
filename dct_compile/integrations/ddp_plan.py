"""Decides about one bucket of DDP, as its reducer will use it, and describes it for the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.convert_frame import compile_lock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup

from dct_compile.comm import Comm, HostsComm
from dct_compile.element_order import ElementOrder
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.link import Link
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.decision import Decision, dense, held_until
from dct_compile.passes.manager import publish
from dct_compile.passes.plan import decide_outside
from dct_compile.passes.record import describe_function, describe_site
from dct_compile.phases import Phase
from dct_compile.posts import Signature
from dct_compile.reasons import Reason
from dct_compile.report import DeferredGraph, GraphReport, Measure, ReportEntry
from dct_compile.runtime import Runtime
from dct_compile.schemes import GradientOffer
from dct_compile.schemes.two_level import TWO_LEVEL
from dct_compile.state.bucket import BucketState

CPU_START_S = 1e-3
"""Seconds by which the first compressed bucket of a backward costs a CPU more than a dense one, about: a hook, a thread, kernels.

``benchmarks/exchange_starts.py`` measures it, and that further ones cost less. On a GPU the host does this work beside the device's.
"""


@dataclass(frozen=True)
class BucketPlan:
    """The decision about one bucket. ``device``: where its buffer is. ``sparse``: whether that is a sparse tensor."""

    decision: Decision
    comm: Comm
    device: torch.device
    sparse: bool

    @classmethod
    def of(
        cls,
        parameters: Sequence[Tensor],
        names: dict[int, str],
        group: ProcessGroup,
        per_host: int,
        phase: Phase,
        link: Link | None,
        *,
        may_be_unused: bool,
        sparse: bool,
    ) -> "BucketPlan":
        members = [Parameter(index, names[id(item)], tuple(item.shape), ElementOrder.of(item)) for index, item in enumerate(parameters)]
        segments, dtype, start_s = segments_of(members), parameters[0].dtype, CPU_START_S if parameters[0].device.type == "cpu" else 0.0
        exchange = gradient_exchange(ALL_REDUCE, segments, dtype, group, may_be_unused, per_host, start_s)
        decision = dense(exchange, Reason.SPARSE) if sparse else decide_outside(exchange, phase.config, lambda _: link)
        decision = held_until(decision, phase.until)
        whole = group.group_name, group.size()
        comm = HostsComm.planned(*whole, per_host) if decision.scheme == TWO_LEVEL else Comm(*whole)
        return cls(decision, comm, parameters[0].device, sparse)

    @property
    def offer(self) -> GradientOffer | None:
        offer = self.decision.offer
        assert offer is None or isinstance(offer, GradientOffer)
        return offer

    def signature(self, reason_to_leave: str | None) -> Signature:
        """Returns the values that the ranks compare. ``reason_to_leave``: the reason to keep DDP's own reducer, if it is kept."""
        exchange = self.decision.exchange
        return Signature(exchange.key(), self.decision.digest if reason_to_leave is None else "dense", exchange.label)

    def reduce(self, grad: Tensor, *state: Tensor) -> Tensor:
        """Averages the buffer ``grad``, with the state in the order of the offer's spec."""
        if self.offer is None:
            return self.reduce_dense(grad)
        names = [tensor.input_name for tensor in self.offer.state.tensors]
        return self.offer.reduce(grad, dict(zip(names, state, strict=True)), self.comm)

    def reduce_dense(self, grad: Tensor) -> Tensor:
        """Averages the buffer ``grad`` uncompressed."""
        return self.comm.wait(self.comm.all_reduce(grad, "avg"))

    def publish(self, name: str, runtime: Runtime, measure: Measure | None) -> ReportEntry:
        """Reports the bucket as a graph of its own."""
        return publish(DeferredGraph(name, partial(self._describe, name)), [(describe_site(self.decision), measure)], runtime)

    def _describe(self, name: str) -> GraphReport:
        """Traces the function of the bucket: dense before, and as it is after the rewriting. A sparse bucket has no such function."""
        if self.sparse:
            return GraphReport(name, "", "")
        exchange = self.decision.exchange
        assert exchange.shape is not None
        # A trace concerns the whole process, so that no other thread may compile meanwhile.
        with compile_lock:
            with FakeTensorMode():
                grad = {"grad": torch.empty(exchange.shape, dtype=exchange.dtype, device=self.device)}
                state = BucketState([], self.offer.state, self.device).tensors if self.offer is not None else {}
            before, nodes_before = describe_function(self.reduce_dense, grad)
            after, nodes_after = describe_function(self.reduce, {**grad, **state})
        return GraphReport(name, before, after, nodes_before, nodes_after)
