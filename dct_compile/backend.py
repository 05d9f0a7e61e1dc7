"""``torch.compile(model, backend="dct")``: Inductor with this project's passes in front of it."""

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx
from torch._dynamo.output_graph import GraphCompileReason

from dct_compile.compiler.graph import Compiled, Settings, compile_graph
from dct_compile.compiler.inputs import parameter_positions
from dct_compile.compiler.options import gradient_group, read_options
from dct_compile.compiler.phases import compile_phases
from dct_compile.config import DCTConfig
from dct_compile.integrations import INTEGRATIONS
from dct_compile.integrations.unseen import note_unseen
from dct_compile.passes.device_copy import has_several_accelerators
from dct_compile.passes.source import innermost_line
from dct_compile.reasons import ENCODES_ITSELF, BreakAdvice, Note
from dct_compile.runtime import RUNTIME
from dct_compile.triton_kernels.cpu.build import prebuild
from dct_compile.workarounds import gloo, torch_versions


def dct(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None, **_: Any
) -> Compiled:
    """Compiles one Dynamo graph.

    Args:
        gm: the graph.
        example_inputs: its inputs, as Dynamo hands them to a backend.
        options: fields of :class:`DCTConfig` beside any Inductor option.
        mode: as for Inductor.

    Returns:
        The compiled graph. Without an initialised process group it is compiled as by Inductor. Whenever it is called inside of a wrapper
        such as DDP, that one is attached to.

    Raises:
        ValueError: An option is unknown, or its value is not allowed.
    """
    config, patches = read_options(options, mode)
    compiled = _compile(gm, example_inputs, config, patches)
    for integration in INTEGRATIONS:
        compiled = integration.attach_at_calls(compiled, parameter_positions(example_inputs), config, RUNTIME)
    return compiled


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], config: DCTConfig, patches: dict[str, Any]) -> Compiled:
    if not dist.is_available() or not (dist.is_initialized() or has_several_accelerators(gm, example_inputs)):
        RUNTIME.reports.called = True
        RUNTIME.warn_once(Note.NO_PROCESS_GROUP)
        return compile_graph(gm, example_inputs, patches)
    _warn_of_untested_torch()
    gloo.shorten_names()
    if not any(isinstance(item, Tensor) and item.is_cuda for item in example_inputs):
        prebuild()  # beside Inductor's own work
    reduced_outside = any(integration.averages and integration.active() for integration in INTEGRATIONS)
    group = gradient_group(config, reduced_outside) if dist.is_initialized() else None
    settings = Settings(config, patches, group, RUNTIME)
    warn_of_graph_break(gm, settings, in_ddp=reduced_outside)
    note_unseen(example_inputs, RUNTIME)
    return compile_phases(gm, example_inputs, settings, reduced_outside=reduced_outside)


def _warn_of_untested_torch() -> None:
    version = torch_versions.untested_version()
    if version is not None:
        newest = ".".join(map(str, torch_versions.NEWEST_TESTED))
        RUNTIME.warn_once(Note.UNTESTED_TORCH.format(version=version, newest=newest))


def warn_of_graph_break(gm: fx.GraphModule, settings: Settings, *, in_ddp: bool) -> None:
    """Warns where Dynamo could not trace what runs between this graph and the next: it runs unseen."""
    ended: GraphCompileReason | None = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break or ENCODES_ITSELF in ended.reason:
        return
    line = innermost_line("".join(traceback.format_list(ended.user_stack)))
    if line is None:  # torch cut it itself, as at DDP's buckets; all of it is compiled
        return
    cause = ended.reason.splitlines()[0].rstrip(".")
    template = Note.ASYNC_COLLECTIVE if "async_op=True" in cause else Note.GRAPH_BREAK
    # Around DDP, fullgraph=True fails at DDP's own forward.
    more = (BreakAdvice.DATA_PARALLEL if settings.group is not None else "") + ("" if in_ddp else BreakAdvice.FULLGRAPH)
    settings.runtime.warn_once(template.format(line=line, cause=cause, more=more))
