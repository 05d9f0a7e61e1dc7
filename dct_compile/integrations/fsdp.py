"""FSDP2 (``fully_shard``): it gathers parameters and reduces gradients in hooks, outside of every graph. Objects of ours take their place.

A target is the root of a model that ``fully_shard`` was applied to: the module whose forward begins a step. All of its parameter groups are
attached together, at the first call of a compiled graph inside of its forward. All ranks run that forward, so they agree there. What was
gathered before is dense.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.config import SHARD_OPTIONS, DCTConfig
from dct_compile.integrations.fsdp_comms import EncodedAllGather, EncodedReduceScatter, own_comm
from dct_compile.integrations.fsdp_plan import GroupPlan, name_of
from dct_compile.integrations.fsdp_replicas import ReplicaAverage
from dct_compile.integrations.interface import Compiled
from dct_compile.integrations.other_options import note_other_options
from dct_compile.passes.decision import Decision
from dct_compile.passes.graph_utils import resolve_group
from dct_compile.passes.manager import publish
from dct_compile.passes.plan import LinkOf
from dct_compile.passes.record import describe_site
from dct_compile.posts import Signature
from dct_compile.report import GraphReport
from dct_compile.runtime import Runtime
from dct_compile.schemes.quantized_shards import QuantizedShards
from dct_compile.workarounds import gloo


@dataclass(frozen=True)
class _Planned:
    """The decisions about one parameter group, and the average of its shards over their copies, if there are any."""

    group: Any
    plan: GroupPlan
    copies: ReplicaAverage | None

    @property
    def decisions(self) -> list[Decision]:
        """The decisions about what a step sends, in the last phase of a training."""
        return [*self.plan.decisions, *([self.copies.last.decision] if self.copies is not None else [])]

    def signatures(self) -> Iterator[tuple[str, Signature]]:
        """Yields what the ranks of a process group compare, with the name of the group."""
        phases = [plan.decision for plan in self.copies.plans.values()] if self.copies is not None else []
        for decision in (*self.plan.decisions, *phases):
            yield decision.exchange.group, Signature(decision.exchange.key(), decision.digest, decision.exchange.label)

    def install(self) -> None:
        """Puts our objects into the places where FSDP communicates; its own where they were ours before, and nothing is compressed now."""
        gather, reduce = (decision.offer if decision is not None else None for decision in (self.plan.gather, self.plan.reduce))
        own_gather, own_reduce = own_comm(self.group._all_gather_comm), own_comm(self.group._reduce_scatter_comm)
        self.group._all_gather_comm = EncodedAllGather(gather, own_gather) if isinstance(gather, QuantizedShards) else own_gather
        self.group._reduce_scatter_comm = EncodedReduceScatter(reduce, own_reduce) if isinstance(reduce, QuantizedShards) else own_reduce
        if self.copies is not None:
            self.copies.install()


class FSDPIntegration:
    """The integration of ``fully_shard``."""

    averages = False

    def active(self) -> list[nn.Module]:
        # A module that is called after the forward, as the head of a chunked loss is, begins an iteration of its own. Its root is the same.
        contexts = {id(state._state_ctx): state._state_ctx for state in _states() if state._state_ctx.iter_forward_root is not None}
        return [state._modules[0] for context in contexts.values() for state in context.all_states if state._is_root]

    def attach(self, target: nn.Module, config: DCTConfig, runtime: Runtime) -> None:
        held: DCTConfig | None = runtime.attached.get(target)
        if held is not None:
            note_other_options(_class_of(target), "FSDP", held, config, SHARD_OPTIONS, runtime)
            return
        gloo.shorten_names()
        planned = _planned(target, config, runtime, lambda name: runtime.links.of(resolve_group(name), config.link))
        _agree(planned, config, runtime)
        for item in planned:
            item.install()
        runtime.attached[target] = config  # not before: a forward after an error tries again

    def attach_at_calls(self, compiled: Compiled, positions: Sequence[int], config: DCTConfig, runtime: Runtime) -> Compiled:
        settled = WeakTensorKeyDictionary()

        def run(*args: Any) -> Any:
            # A graph with parameters is looked at once for each set of them: the modules around it stay the same.
            first = args[positions[0]] if positions else None
            if first is None or first not in settled:
                for target in self.active():
                    self.attach(target, config, runtime)
                if first is not None:
                    settled[first] = True
            return compiled(*args)

        if hasattr(compiled, "serialize"):  # ahead-of-time compilation stores the graph itself
            run.serialize = compiled.serialize  # type: ignore[attr-defined]
        return run

    def preview(self, target: nn.Module, config: DCTConfig, runtime: Runtime) -> list[Decision]:
        planned = _planned(target, config, runtime, lambda name: runtime.links.at_once(resolve_group(name), config.link))
        return [decision for item in planned for decision in item.decisions]

    def paused(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # a forward alone prepares nothing


def _planned(target: nn.Module, config: DCTConfig, runtime: Runtime, link_of: LinkOf) -> list[_Planned]:
    """Decides about all parameter groups of ``target``, and reports it: an entry for each group, and one for its copies."""
    title = runtime.reports.name_model(target, f"fully_shard({_class_of(target)})")
    planned = []
    for number, group in enumerate(_groups(target)):
        name = f"{title} {group._module_fqn or ''}".rstrip()
        item = _Planned(group, GroupPlan.of(group, number, config, link_of), ReplicaAverage.of(group, name, config, runtime, link_of))
        planned.append(item)
        if item.plan.decisions:
            entry = publish(GraphReport(name, "", ""), [(describe_site(decision), None) for decision in item.plan.decisions], runtime)
            entry.owner, entry.model = weakref.ref(target), title
        if item.copies is not None:
            item.copies.publish(item.copies.last)
        runtime.reports.patterns.look(config, [name_of(held) for held in group.fsdp_params])
    return planned


def _class_of(target: nn.Module) -> str:
    """Returns the name of the class that ``fully_shard`` was given."""
    return type(target).__name__.removeprefix("FSDP")


def _agree(planned: Sequence[_Planned], config: DCTConfig, runtime: Runtime) -> None:
    """Compares the decisions with those of the other ranks of each process group."""
    signatures: dict[str, list[Signature]] = {}
    for item in planned:
        for name, signature in item.signatures():
            signatures.setdefault(name, []).append(signature)
    for name, own in signatures.items():
        runtime.agreement.check(resolve_group(name), config.comparable(), own, fresh=True)


def _groups(target: nn.Module) -> list[Any]:
    """Returns the parameter groups of a model, in the order of its modules."""
    (state,) = [state for state in _states() if target in state._modules]
    return [group for inner in state._state_ctx.all_states for group in inner._fsdp_param_groups]


def _states() -> Iterator[Any]:
    """Yields the states that ``fully_shard`` has given to modules of this process."""
    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        if hasattr(state, "_fsdp_param_groups"):
            yield state
