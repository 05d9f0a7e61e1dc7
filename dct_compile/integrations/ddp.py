"""DistributedDataParallel: its reducer sends gradients from C++, outside of every graph. A communication hook takes its place."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType

from torch import Tensor, nn
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dct_compile.config import DCTConfig
from dct_compile.integrations.ddp_reducer import BucketPlan, GradientCompressor
from dct_compile.integrations.interface import Compiled
from dct_compile.passes.collectives import ALL_REDUCE
from dct_compile.passes.manager import publish
from dct_compile.posts import Signature
from dct_compile.reasons import Reason
from dct_compile.report import GraphReport, SiteReport
from dct_compile.runtime import Runtime
from dct_compile.state_store import named_parameters

_ATTRIBUTE = "_dct_gradient_compressor"


class DDPIntegration:
    """The integration of DistributedDataParallel; a target is a DDP module."""

    def active(self) -> list[DistributedDataParallel]:
        found: list[DistributedDataParallel] = []
        frame: FrameType | None = inspect.currentframe()
        while frame is not None:
            if frame.f_code is DistributedDataParallel.forward.__code__:
                found.append(frame.f_locals["self"])
            frame = frame.f_back
        return found

    def attach(self, target: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> None:
        if hasattr(target, _ATTRIBUTE):
            return
        plans = _future_plans(target, config)
        reason = _reason_to_leave(target, plans)
        agree = partial(_agree, target.process_group, config, runtime, [plan.signature(reason) for plan in plans])
        if reason is not None:
            setattr(target, _ATTRIBUTE, None)
            _publish_dense(target, reason, runtime)
            _at_first_gradient(target, agree)
            return
        compressor = GradientCompressor(target, config, runtime, agree)
        setattr(target, _ATTRIBUTE, compressor)
        target.register_comm_hook(compressor, GradientCompressor.reduce)

    def preview(self, target: DistributedDataParallel, config: DCTConfig, runtime: Runtime) -> None:
        """Reports the result that :meth:`attach` will have, and attaches nothing.

        The buckets are those that DDP will have from its second step on if gradients come in the reverse order of the parameters. The
        bytes that it sends do not depend on how parameters are bucketed.
        """
        plans = _future_plans(target, config)
        reason = _reason_to_leave(target, plans)
        if reason is not None:
            _publish_dense(target, reason, runtime)
            return
        for index, plan in enumerate(plans):
            plan.publish(f"DDP bucket {index} of group {target.process_group.group_name}", runtime, None)

    def track_parameters(self, compiled: Compiled, targets: Sequence[DistributedDataParallel], positions: Sequence[int]) -> Compiled:
        compressors = [found for target in targets if (found := getattr(target, _ATTRIBUTE)) is not None]
        if not compressors:
            return compiled

        def run(*args: object) -> object:
            for compressor in compressors:
                if compressor.uncompiled:
                    compressor.mark_compiled([args[position] for position in positions])
            return compiled(*args)

        return run

    @contextmanager
    def paused(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(module.no_sync())
                    stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
                    module.require_forward_param_sync = False
            yield


def _agree(group: ProcessGroup, config: DCTConfig, runtime: Runtime, signatures: Sequence[Signature]) -> None:
    """Compares the decisions about a module's gradients with those of the other ranks, which all come at its first backward."""
    runtime.agreement.check(group, config.comparable(), signatures, fresh=True)


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
    if module.process_group.size() == 1:
        return Reason.ONE_RANK
    if any(hook is not GradientCompressor.reduce for hook, _ in getattr(module, "_comm_hooks", [])):
        return Reason.OWN_HOOK
    if getattr(module, "_use_python_reducer", False):
        return Reason.PYTHON_REDUCER
    decisions = [plan.decision for plan in plans]
    if any(decision.compressed for decision in decisions):
        return None
    return "; ".join(dict.fromkeys(decision.reason for decision in decisions))


def _future_plans(module: DistributedDataParallel, config: DCTConfig) -> list[BucketPlan]:
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    unused = module.find_unused_parameters
    sparse = {id(parameter) for parameter, expected in zip(*module._build_params_for_reducer(), strict=True) if expected}
    return [
        BucketPlan.of(bucket, names, module.process_group, config, may_be_unused=unused, sparse=id(bucket[0]) in sparse)
        for bucket in _future_buckets(module)
    ]


def _future_buckets(module: DistributedDataParallel) -> list[list[Tensor]]:
    parameters, sparse = module._build_params_for_reducer()
    parameters.reverse()
    first = [_DEFAULT_FIRST_BUCKET_BYTES] if module.bucket_bytes_cap_default else []
    limits = getattr(module, "bucket_bytes_cap_list", []) or [*first, module.bucket_bytes_cap]
    buckets, _ = _compute_bucket_assignment_by_size(parameters, limits, sparse[::-1])
    return [[parameters[position] for position in bucket] for bucket in buckets]


def _publish_dense(module: DistributedDataParallel, reason: str, runtime: Runtime) -> None:
    """Reports that ``module`` keeps DDP's own reducer."""
    publish(GraphReport("DistributedDataParallel", "", ""), [(_dense_site(module, reason), None)], runtime)


def _dense_site(module: DistributedDataParallel, reason: str) -> SiteReport:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    numel = sum(parameter.numel() for parameter in parameters)
    size = module.process_group.size()
    sent = int(ALL_REDUCE.sent(sum(parameter.numel() * parameter.itemsize for parameter in parameters), size))
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    group = module.process_group.group_name
    return SiteReport("all_reduce", "gradient", "all of DDP's parameters", (numel,), dtype, "dense", str(reason), sent, sent, group, size)
