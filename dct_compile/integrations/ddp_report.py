"""The report's rows about a DDP module beside its compressed buckets, and the names of its rows."""

import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from dct_compile.buckets import smaller_buckets
from dct_compile.config import DCTConfig
from dct_compile.exchange import BUFFERS, GRADIENT, OTHER, Collective, Exchange
from dct_compile.integrations.ddp_plan import BucketPlan
from dct_compile.link import Link, duration
from dct_compile.passes.collectives import ALL_REDUCE, BROADCAST
from dct_compile.passes.decision import Decision, dense
from dct_compile.passes.manager import publish
from dct_compile.passes.record import describe_site
from dct_compile.reasons import Note, Reason, Unseen
from dct_compile.report import GraphReport, wrapped_class
from dct_compile.runtime import Runtime
from dct_compile.state.store import named_parameters
from dct_compile.traffic import NOTHING


def title_of(module: DistributedDataParallel, runtime: Runtime) -> str:
    """Returns the module's name in the report, such as ``DDP(Net)``; ``DDP(Net) #2`` for the second one of its class."""
    return runtime.reports.name_model(module, f"DDP({wrapped_class(module)})")


def bucket_name(title: str, index: int, group: ProcessGroup) -> str:
    """Returns the name of a bucket of the module ``title``, with the group if that is not the default one."""
    suffix = "" if group is dist.group.WORLD else f" of group {group.group_name}"
    return f"{title} bucket {index}{suffix}"


def averaged_parameters(module: DistributedDataParallel) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters whose gradients DDP averages in its buckets, by name."""
    averaged = {id(parameter) for parameter in module._module_parameters if parameter.requires_grad}
    return [(name, parameter) for name, parameter in named_parameters(module) if id(parameter) in averaged]


def publish_module(module: DistributedDataParallel, reason: str | None, config: DCTConfig, runtime: Runtime) -> list[Decision]:
    """Reports all that DDP sends itself in every step, and looks for what the patterns of ``config`` match.

    ``reason``: the reason why its reducer stays, if it does.

    Returns:
        The decisions about all that is sent beside the buckets.
    """
    title, beside = title_of(module, runtime), list(_beside_buckets(module, runtime))
    decisions = [*([_dense_buckets(module, reason)] if reason is not None else []), *beside]
    if decisions:
        entry = publish(GraphReport(title, "", ""), [(describe_site(decision), None) for decision in decisions], runtime)
        entry.owner, entry.model = weakref.ref(module), title
    averaged = [*(parameter for _, parameter in averaged_parameters(module)), *module._delay_all_reduce_params]
    held = {id(parameter) for parameter in averaged}
    others = [(name, parameter) for name, parameter in named_parameters(module) if parameter.requires_grad and id(parameter) not in held]
    runtime.reports.divide(averaged, others)
    runtime.reports.patterns.look(config, [name for name, _ in named_parameters(module)])
    return beside


def note_buckets(title: str, plans: Sequence[BucketPlan], config: DCTConfig, link: Link | None, runtime: Runtime) -> None:
    """Notes buckets of another size, if they would save time on ``link``. What arrives late is waited for by no step.

    ``title``: the module's name. ``plans``: those of its buckets.
    """
    traffics = [plan.decision.traffic for plan in plans]
    better = smaller_buckets(link, [plan.decision.exchange.segment_bytes for plan in plans], traffics)
    if better is not None and config.arrival == "now":
        share = float(traffics[-1].wire / sum(traffics, NOTHING).wire)
        runtime.reports.note(Note.BUCKETS.format(module=title, share=share, mib=better.mib, saved=duration(better.saved_s)))


def _dense_buckets(module: DistributedDataParallel, reason: str) -> Decision:
    parameters = [parameter for _, parameter in averaged_parameters(module)]
    return _dense(module, ALL_REDUCE, GRADIENT, "all of DDP's parameters", parameters, str(reason))


def _beside_buckets(module: DistributedDataParallel, runtime: Runtime) -> Iterator[Decision]:
    if module.process_group.size() == 1:
        return
    if module._delay_all_reduce_params:
        delayed = {id(parameter) for parameter in module._delay_all_reduce_params}
        names = [name for name, parameter in named_parameters(module) if id(parameter) in delayed]
        yield _dense(module, ALL_REDUCE, GRADIENT, ", ".join(names), module._delay_all_reduce_params, Reason.DELAYED)
    if module._delay_all_reduce_all_params or getattr(module, "_use_python_reducer", False):
        return  # it leaves out all of the following
    if module.find_unused_parameters and not module.static_graph:
        used = torch.empty(len(averaged_parameters(module)), dtype=torch.int32, device="meta")
        yield _dense(module, ALL_REDUCE, OTHER, "flags of DDP: which parameters were used", [used], Reason.USED_PARAMETERS)
    if not module.broadcast_buffers or not module.named_module_buffers:
        return
    if hasattr(module, "buffer_hook"):
        runtime.reports.note(Note.UNSEEN.format(what=Unseen.BUFFER_HOOK))
        return
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
    for name, buffer in module.named_module_buffers.items():
        by_dtype[buffer.dtype][name.replace("_orig_mod.", "")] = buffer
    for buffers in by_dtype.values():
        yield _dense(module, BROADCAST, BUFFERS, ", ".join(buffers), list(buffers.values()), Reason.BUFFERS)


def _dense(
    module: DistributedDataParallel, collective: Collective, kind: str, name: str, tensors: Sequence[Tensor], reason: str
) -> Decision:
    """Describes a collective of DDP's own that carries all of ``tensors``."""
    numel, size = sum(tensor.numel() for tensor in tensors), sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    group = module.process_group
    exchange = Exchange(collective, kind, name, (numel,), tensors[0].dtype, group.group_name, group.size(), group.rank(), size)
    return dense(exchange, reason)
