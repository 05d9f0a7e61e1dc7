"""Keeps the decisions about a model of ``fully_shard`` for the parameters that are trained now: layers may be frozen or thawed later.

A parameter group has a plan for each set of its parameters that was trained so far. A set that is new is planned and agreed on by all ranks
in the forward that sees it first. What a plan holds on to must not keep the model alive: it refers to parameters by their places.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dct_compile.config import DCTConfig
from dct_compile.integrations.fsdp_comms import EncodedAllGather, EncodedReduceScatter, own_comm
from dct_compile.integrations.fsdp_plan import GroupPlan, Trained, name_of, trained_of
from dct_compile.integrations.fsdp_replicas import ReplicaAverage
from dct_compile.passes.decision import Decision
from dct_compile.passes.graph_utils import resolve_group
from dct_compile.passes.manager import publish
from dct_compile.passes.plan import LinkOf
from dct_compile.passes.record import describe_site
from dct_compile.posts import Signature
from dct_compile.report import GraphReport, ReportEntry
from dct_compile.runtime import Runtime
from dct_compile.schemes.quantized_shards import QuantizedShards


@dataclass(eq=False)
class GroupDecisions:
    """The decisions about one parameter group, and the average of its shards over their copies, if there are any.

    ``entry``: of the report, while these decisions hold.
    """

    plan: GroupPlan
    copies: ReplicaAverage | None
    entry: ReportEntry | None = None

    @property
    def decisions(self) -> list[Decision]:
        """The decisions about what a step sends, in the last phase of a training."""
        return [*self.plan.decisions, *([self.copies.last.decision] if self.copies is not None else [])]

    def signatures(self) -> Iterator[tuple[str, Signature]]:
        """Yields what the ranks of a process group compare, with the name of the group."""
        phases = [plan.decision for plan in self.copies.plans.values()] if self.copies is not None else []
        for decision in (*self.plan.decisions, *phases):
            yield decision.exchange.group, Signature(decision.exchange.key(), decision.digest, decision.exchange.label)

    def install(self, group: Any) -> None:
        """Puts our objects into the places where FSDP communicates; its own where they were ours before, and nothing is compressed now."""
        gather, reduce = (decision.offer if decision is not None else None for decision in (self.plan.gather, self.plan.reduce))
        own_gather, own_reduce = own_comm(group._all_gather_comm), own_comm(group._reduce_scatter_comm)
        group._all_gather_comm = EncodedAllGather(gather, own_gather) if isinstance(gather, QuantizedShards) else own_gather
        group._reduce_scatter_comm = EncodedReduceScatter(reduce, own_reduce) if isinstance(reduce, QuantizedShards) else own_reduce
        if self.copies is not None:
            self.copies.install()

    def withdraw(self, runtime: Runtime) -> None:
        """Takes the rows out of the report."""
        if self.entry is not None:
            runtime.reports.remove(self.entry)
        if self.copies is not None:
            self.copies.withdraw()


class Attached:
    """The decisions about ``target``, the root of a model, whose parameter groups are ``groups``."""

    def __init__(self, target: nn.Module, groups: Sequence[Any], config: DCTConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.target: weakref.ref[object] = weakref.ref(target)
        self.title = runtime.reports.name_model(target, f"fully_shard({class_of(target)})")
        self.groups = [weakref.ref(group) for group in groups]
        self._current: list[Trained | None] = [None] * len(groups)
        self._plans: dict[tuple[int, Trained], GroupDecisions] = {}

    def follow(self) -> None:
        """Puts those decisions into place that are for the parameters that are trained now. All ranks come here in the same forward."""
        changed = [(number, now) for number, now in enumerate(self._trained()) if now != self._current[number]]
        if not changed:
            return
        fresh = {
            key: self._decide(key[0], lambda name: self.runtime.links.of(resolve_group(name), self.config.link))
            for key in changed
            if key not in self._plans
        }
        self._agree(list(fresh.values()))
        self._plans.update(fresh)
        for number, now in changed:
            before = self._current[number]
            if before is not None:
                self._plans[number, before].withdraw(self.runtime)
            self._publish(number, self._plans[number, now])
            self._plans[number, now].install(self._group(number))
            self._current[number] = now

    def preview(self) -> list[Decision]:
        """Reports the decisions that hold for the parameters that are trained now, and puts none into place."""
        found = []
        for number in range(len(self.groups)):
            item = self._decide(number, lambda name: self.runtime.links.at_once(resolve_group(name), self.config.link))
            self._publish(number, item)
            found += item.decisions
        return found

    def _trained(self) -> list[Trained]:
        return [trained_of(self._group(number)) for number in range(len(self.groups))]

    def _group(self, number: int) -> Any:
        group = self.groups[number]()
        assert group is not None, "its forward runs"
        return group

    def _name(self, number: int) -> str:
        return f"{self.title} {self._group(number)._module_fqn or ''}".rstrip()

    def _decide(self, number: int, link_of: LinkOf) -> GroupDecisions:
        group = self._group(number)
        plan = GroupPlan.of(group, number, self.config, link_of)
        return GroupDecisions(plan, ReplicaAverage.of(group, self._name(number), self.config, self.runtime, link_of))

    def _publish(self, number: int, item: GroupDecisions) -> None:
        """Reports an entry for a group, and one for its copies."""
        if item.plan.decisions:
            sites = [(describe_site(decision), None) for decision in item.plan.decisions]
            item.entry = publish(GraphReport(self._name(number), "", ""), sites, self.runtime)
            item.entry.owner, item.entry.model = self.target, self.title
        if item.copies is not None:
            item.copies.publish(item.copies.last)
        self.runtime.reports.patterns.look(self.config, [name_of(held) for held in self._group(number).fsdp_params])

    def _agree(self, planned: Sequence[GroupDecisions]) -> None:
        """Compares decisions with those of the other ranks of each process group."""
        signatures: dict[str, list[Signature]] = {}
        for item in planned:
            for name, signature in item.signatures():
                signatures.setdefault(name, []).append(signature)
        for name, own in signatures.items():
            self.runtime.agreement.check(resolve_group(name), self.config.comparable(), own, fresh=True)


def class_of(target: nn.Module) -> str:
    """Returns the name of the class that ``fully_shard`` was given."""
    return type(target).__name__.removeprefix("FSDP")
