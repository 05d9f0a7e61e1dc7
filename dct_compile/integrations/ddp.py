"""DistributedDataParallel: its reducer sends gradients from C++, outside of every graph. A communication hook takes its place."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dct_compile.config import DCTConfig
from dct_compile.groups import ranks_per_host
from dct_compile.integrations.ddp_calls import parts_of_compiled_model, running_modules
from dct_compile.integrations.ddp_plan import BucketPlan
from dct_compile.integrations.ddp_reducer import GradientCompressor
from dct_compile.integrations.ddp_report import bucket_name, note_buckets, publish_module, title_of
from dct_compile.integrations.interface import Compiled
from dct_compile.integrations.other_options import note_other_options
from dct_compile.integrations.pipeline import running_stage
from dct_compile.link import Link
from dct_compile.passes.decision import Decision, dense
from dct_compile.phases import Phase, phases_of
from dct_compile.reasons import Reason
from dct_compile.report import wrapped_class
from dct_compile.runtime import Runtime
from dct_compile.state.store import named_parameters
from dct_compile.workarounds import gloo


@dataclass(frozen=True)
class _Attached:
    """The decision about a DDP module. ``compressor``: its communication hook, ``None`` where DDP's own reducer stays."""

    config: DCTConfig
    compressor: GradientCompressor | None


class DDPIntegration:
    """The integration of DistributedDataParallel; a target is a DDP module."""

    averages = True

    def active(self) -> list[DistributedDataParallel]:
        return running_modules()

    def attach(self, target: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> None:
        held: _Attached | None = runtime.attached.get(target)
        if held is not None:
            if config != held.config:
                note_other_options(wrapped_class(target), "DDP", held.config, config, (), runtime)
            return
        gloo.shorten_names()  # the graph may have been compiled before there was a group
        phases = phases_of(config)
        link = runtime.links.at_once(target.process_group, config.link)
        reason = _reason_to_leave(target, _future_plans(target, config, phases[-1], link))
        agree = partial(_agree, weakref.ref(target), config, runtime, reason)
        publish_module(target, reason, config, runtime)
        if reason is not None:
            runtime.attached[target] = _Attached(config, None)
            _at_first_gradient(target, partial(agree, link))
            return
        compressor = GradientCompressor(target, config, runtime, agree)
        runtime.attached[target] = _Attached(config, compressor)
        target.register_comm_hook(compressor, GradientCompressor.reduce)
        # The hook is the reducer's, which a copy of the module makes anew; nothing in the module itself may be copied or pickled along.
        target._comm_hooks.pop()

    def preview(self, target: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> list[Decision]:
        """Reports the result that :meth:`attach` will have, and attaches nothing.

        The buckets are those that DDP will have from its second step on if gradients come in the reverse order of the parameters. The
        bytes that it sends do not depend on how parameters are bucketed. The phase is the last one.
        """
        link = runtime.links.at_once(target.process_group, config.link)
        plans = _future_plans(target, config, phases_of(config)[-1], link)
        reason = _reason_to_leave(target, plans)
        beside = publish_module(target, reason, config, runtime)
        title = title_of(target, runtime)
        if reason is None:
            note_buckets(title, plans, config, link, runtime)
        for index, plan in enumerate(plans if reason is None else []):
            plan.publish(bucket_name(title, index, target.process_group), runtime, None).model = title
        kept = _reason_to_keep(target)
        return [plan.decision if kept is None else dense(plan.decision.exchange, kept) for plan in plans] + beside

    def attach_at_calls(self, compiled: Compiled, positions: Sequence[int], config: DCTConfig, runtime: Runtime) -> Compiled:
        settled: weakref.WeakSet[object] = weakref.WeakSet()
        attach_around = partial(self._attach_around, config=config, runtime=runtime)

        def run(*args: object) -> object:
            innermost = DistributedDataParallel._active_ddp_module
            place = DistributedDataParallel if innermost is None else innermost  # the class stands for all calls outside of DDP
            # A forward without gradients has no backward: one rank may run it alone.
            if place not in settled and torch.is_grad_enabled() and attach_around(innermost, [args[position] for position in positions]):
                settled.add(place)
            return compiled(*args)

        if hasattr(compiled, "serialize"):  # ahead-of-time compilation stores the graph itself
            run.serialize = compiled.serialize  # type: ignore[attr-defined]
        return run

    def _attach_around(
        self, innermost: DistributedDataParallel | None, parameters: Sequence[object], config: DCTConfig, runtime: Runtime
    ) -> bool:
        """Attaches the DDP modules around the call of a graph, and those beside it in the same compiled model.

        Args:
            innermost: The DDP module whose forward calls the graph.
            parameters: The parameters that the graph is called with.
            config: The options of the graph.
            runtime: Where to report.

        Returns:
            True if further calls of the graph at this place find nothing to do.
        """
        running = running_modules()
        if running:
            config.check_single_average()
        targets = [*running, *parts_of_compiled_model()]
        for target in targets:
            # In no_sync() a rank may be alone. A pipeline runs all its forwards there, on every rank.
            if target.require_backward_grad_sync or running_stage() is not None:
                self.attach(target, config, runtime)
        held = [runtime.attached.get(target) for target in targets]
        compressors = [item.compressor for item in held[: len(running)] if item is not None and item.compressor is not None]
        for compressor in compressors:
            compressor.mark_compiled(parameters)
        # The innermost module does not tell which ones are around it; a call outside of DDP does not tell the model.
        known = running == [innermost] or not targets
        return known and None not in held and not any(compressor.uncompiled for compressor in compressors)

    @contextmanager
    def paused(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
                    stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
                    module.require_forward_param_sync = False
            yield


def _agree(
    module: "weakref.ref[DistributedDataParallel]", config: DCTConfig, runtime: Runtime, reason: str | None, link: Link | None
) -> None:
    """Compares the decisions about a module's gradients with those of the other ranks, which all come at its first backward.

    ``reason``: the reason to keep DDP's own reducer, if it is kept.
    """
    target = module()
    assert target is not None, "its backward runs"
    by_phase = [_future_plans(target, config, phase, link) for phase in phases_of(config)]
    if reason is None:
        note_buckets(title_of(target, runtime), by_phase[-1], config, link, runtime)
    signatures = [plan.signature(reason) for plans in by_phase for plan in plans]
    runtime.agreement.check(target.process_group, config.comparable(), signatures, fresh=True)


def _at_first_gradient(module: DistributedDataParallel, action: Callable[[], None]) -> None:
    """Calls ``action`` before DDP's own reducer sends anything: when the first gradient of a parameter is there."""
    handles: list[RemovableHandle] = []

    def once(_: Tensor) -> None:
        if handles:
            while handles:
                handles.pop().remove()
            action()

    handles.extend(parameter.register_hook(once) for parameter in module.parameters() if parameter.requires_grad)


def _reason_to_leave(module: DistributedDataParallel, plans: Sequence[BucketPlan]) -> str | None:
    """Why DDP's own reducer stays: the user has taken its place, or no bucket would be compressed."""
    kept = _reason_to_keep(module)
    if kept is not None:
        return kept
    decisions = [plan.decision for plan in plans]
    if any(decision.compressed for decision in decisions):
        return None
    return "; ".join(dict.fromkeys(decision.reason for decision in decisions))


def _reason_to_keep(module: DistributedDataParallel) -> str | None:
    """Why DDP's own reducer stays whatever the schemes could do, if it does."""
    if module.process_group.size() == 1:
        return Reason.ONE_RANK
    if module._comm_hooks or "comm_hook" in module._get_ddp_logging_data():  # of Python, or of C++
        return Reason.OWN_HOOK
    return Reason.PYTHON_REDUCER if getattr(module, "_use_python_reducer", False) else None


def _future_plans(module: DistributedDataParallel, config: DCTConfig, phase: Phase, link: Link | None) -> list[BucketPlan]:
    group = module.process_group
    per_host = ranks_per_host(group, config.ranks_per_host)
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    unused = module.find_unused_parameters
    sparse = {id(parameter) for parameter, expected in zip(*module._build_params_for_reducer(), strict=True) if expected}
    return [
        BucketPlan.of(bucket, names, group, per_host, phase, link, may_be_unused=unused, sparse=id(bucket[0]) in sparse)
        for bucket in _future_buckets(module)
    ]


def _future_buckets(module: DistributedDataParallel) -> list[list[Tensor]]:
    parameters, sparse = module._build_params_for_reducer()
    parameters.reverse()
    first = [_DEFAULT_FIRST_BUCKET_BYTES] if module.bucket_bytes_cap_default else []
    limits = getattr(module, "bucket_bytes_cap_list", []) or [*first, module.bucket_bytes_cap]
    buckets, _ = _compute_bucket_assignment_by_size(parameters, limits, sparse[::-1])
    return [[parameters[position] for position in bucket] for bucket in buckets]
