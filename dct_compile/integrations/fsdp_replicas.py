"""Hybrid sharding (HSDP): the shards have copies on other ranks, and FSDP averages a shard's gradient over its copies by all_reduce.

That all_reduce has no object to replace. So FSDP is told that a shard has no copies, by a process group of this rank alone, and our average
runs in the hook that FSDP calls behind its all_reduce. The hook is not called where FSDP accumulates without an all_reduce
(``set_requires_all_reduce(False)``), as before.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dct_compile.comm import Comm
from dct_compile.config import DCTConfig
from dct_compile.element_order import local_tensor
from dct_compile.exchange import Parameter, gradient_exchange, segments_of
from dct_compile.integrations.ddp_plan import BucketPlan
from dct_compile.integrations.fsdp_plan import name_of, trained_of
from dct_compile.measure import BucketMeasure
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.decision import dense, held_until
from dct_compile.passes.plan import LinkOf, decide
from dct_compile.phases import Phase, phase_at, phases_of
from dct_compile.reasons import Reason
from dct_compile.report import ReportEntry
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import BucketState
from dct_compile.state.exchanges import count_exchange, exchanges_of


class NoCopies:
    """The process group of a shard without copies, as far as FSDP uses it: its all_reduce changes nothing."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0

    def allreduce(self, tensors: list[Tensor], options: Any) -> None:
        """Leaves ``tensors`` as they are."""


def copies_of(group: Any) -> ProcessGroup | None:
    """Returns the ranks that hold copies of the shards of ``group``, an FSDPParamGroup; ``None`` where there are none."""
    found: ProcessGroup | NoCopies | None = getattr(group.mesh_info, "replicate_process_group", None)
    if isinstance(found, NoCopies):
        return group._all_reduce_hook.process_group  # type: ignore[no-any-return]
    return found if found is not None and found.size() > 1 else None


class ReplicaAverage:
    """Averages the gradients of the shards of one parameter group over their copies: the hook that FSDP calls.

    ``trained``: the parameters that it is for. ``plans``: the decisions, by the first exchange of a phase.
    """

    def __init__(self, group: Any, process_group: ProcessGroup, title: str, config: DCTConfig, runtime: Runtime, link_of: LinkOf) -> None:
        self.process_group, self.config, self.runtime, self.title = process_group, config, runtime, title
        self.group = weakref.ref(group)
        self.trained = trained_of(group)
        self.padded = sum(held._sharded_param_data.numel() for held in self._held(group))
        self.phases = phases_of(config)
        own = group._all_reduce_hook
        reason = Reason.OWN_HOOK_OF_FSDP if own is not None and not isinstance(own, ReplicaAverage) else None
        self.plans = {phase.first: self._plan(group, phase, link_of, reason) for phase in self.phases}
        self.shown: tuple[BucketPlan, BucketState | None] | None = None
        self.entry: ReportEntry | None = None

    @classmethod
    def of(cls, group: Any, title: str, config: DCTConfig, runtime: Runtime, link_of: LinkOf) -> "ReplicaAverage | None":
        """Returns the average of the shards of ``group``, ``None`` where they have no copies or this rank trains nothing of it."""
        process_group = copies_of(group)
        trains = any(held.sharded_param.requires_grad and local_tensor(held.sharded_param).numel() for held in group.fsdp_params)
        return cls(group, process_group, title, config, runtime, link_of) if process_group is not None and trains else None

    @property
    def last(self) -> BucketPlan:
        """The decision of the last phase."""
        return self.plans[self.phases[-1].first]

    def install(self) -> None:
        """Takes the place of FSDP's all_reduce if anything is compressed, and that of an average for other parameters in any case."""
        group = self.group()
        assert group is not None, "its forward runs"
        is_ours = isinstance(group._all_reduce_hook, ReplicaAverage)
        if not is_ours and not any(plan.decision.compressed for plan in self.plans.values()):
            return
        group.mesh_info = copy.copy(group.mesh_info)
        group.mesh_info.replicate_process_group = NoCopies()
        group._all_reduce_hook = self

    def publish(self, plan: BucketPlan, state: BucketState | None = None) -> None:
        """Reports the decision of a phase in the place of that of the phase before."""
        if self.shown == (plan, state):
            return
        if self.entry is not None:
            self.runtime.reports.remove(self.entry)
        self.shown = plan, state
        self.entry = plan.publish(f"{self.title} copies", self.runtime, BucketMeasure([state]) if state is not None else None)
        self.entry.owner, self.entry.model = self.group, self.title

    def withdraw(self) -> None:
        """Takes the row out of the report."""
        if self.entry is not None:
            self.runtime.reports.remove(self.entry)
        self.shown = self.entry = None

    def __call__(self, shards: Tensor) -> None:
        """Averages ``shards``, the flat buffer of FSDP's reduce_scatter with its padding, in place."""
        group = self.group()
        assert group is not None, "its backward runs"
        sums = group.gradient_divide_factor is not None  # then FSDP's all_reduce would not divide
        # A step without some of the parameters, or with others: buffers of equal size may hold the gradients of other parameters.
        if shards.numel() != self.padded or trained_of(group) != self.trained:
            dist.all_reduce(shards, dist.ReduceOp.SUM if sums else dist.ReduceOp.AVG, self.process_group)
            return
        views = self._views(group, shards)
        mean = self._average(self._parts(group), torch.cat(views))  # a copy, which the mean may overwrite
        if sums:
            mean = mean * self.process_group.size()
        for view, part in zip(views, mean.split([view.numel() for view in views]), strict=True):
            view.copy_(part)

    def _average(self, parts: Sequence[Any], buffer: Tensor) -> Tensor:
        phase = self._begin_exchange(parts)
        plan = self.plans[phase.first]
        if plan.offer is None:
            self.publish(plan)
            return plan.reduce_dense(buffer)
        compressed = [parts[segment.parameter.position].sharded_param for segment in plan.offer.members.compressed]
        state = self.runtime.states.bucket(compressed, plan.offer.state, "FSDP", buffer.device)  # parameters may be offloaded
        self.publish(plan, state)
        self.runtime.begin_exchange(state, phase.config)
        return plan.offer.reduce(buffer, state.tensors, plan.comm, in_place=True)

    def _begin_exchange(self, parts: Sequence[Any]) -> Phase:
        """Looks whether the last gradients were applied, and counts this exchange. Returns the phase that it is in."""
        parameters = [held.sharded_param for held in parts]
        self.runtime.states.use.look(parameters)
        if len(self.phases) == 1:
            return self.phases[0]
        uses = self.runtime.states.use.of(parameters)
        self.runtime.agree_on_exchanges(self.process_group, self.config, [(name_of(held), held.sharded_param) for held in parts])
        phase = phase_at(self.phases, exchanges_of(uses))
        count_exchange(uses)
        return phase

    def _held(self, group: Any) -> list[Any]:
        """Returns the parameters that this is for."""
        return [held for held, is_trained in zip(group.fsdp_params, self.trained, strict=True) if is_trained]

    def _parts(self, group: Any) -> list[Any]:
        """Returns those of which this rank holds something. It may not, of one that is shorter than the ranks are many."""
        return [held for held in self._held(group) if local_tensor(held.sharded_param).numel()]

    def _views(self, group: Any, shards: Tensor) -> list[Tensor]:
        """Returns the parts of FSDP's buffer that hold gradients, without the padding between them."""
        held = self._held(group)
        numels = [local_tensor(item.sharded_param).numel() for item in held]
        split = shards.split([item._sharded_param_data.numel() for item in held])
        return [part[:numel] for part, numel in zip(split, numels, strict=True) if numel]

    def _plan(self, group: Any, phase: Phase, link_of: LinkOf, reason: str | None) -> BucketPlan:
        parts = self._parts(group)
        members = [Parameter(index, name_of(held), tuple(local_tensor(held.sharded_param).shape)) for index, held in enumerate(parts)]
        first = self._held(group)[0]
        dtype = group._reduce_dtype or first.param_dtype or first.orig_dtype
        exchange = gradient_exchange(ALL_REDUCE, segments_of(members), dtype, self.process_group)
        decision = dense(exchange, reason) if reason is not None else decide(exchange, phase.config, link_of)
        comm = Comm(self.process_group.group_name, self.process_group.size())
        return BucketPlan(held_until(decision, phase.until), comm, group.device, sparse=False)
