"""A backend that decides and rewrites as backend "dct" does, and computes nothing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dct_compile.compiler.graph import Compiled, GraphCompiler, Settings
from dct_compile.compiler.options import gradient_group, read_options
from dct_compile.compiler.state_inputs import blank_state
from dct_compile.integrations import INTEGRATIONS
from dct_compile.integrations.unseen import note_unseen
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.decision import Decision
from dct_compile.phases import phases_of
from dct_compile.runtime import Runtime


def dry_run(options: Mapping[str, Any] | None, runtime: Runtime, collect: Callable[[Sequence[Decision]], object] | None = None) -> Compiled:
    """Returns a backend that compiles up to the graphs that Inductor would generate code from.

    Its findings about the last phase of a training are reported to ``runtime``. A compiled graph computes nothing: outputs are zeros of the
    right shape. Nothing is attached to a wrapper such as DDP, and nothing is exchanged with other ranks. Needs a process group.

    Args:
        options: The options of backend "dct" and of Inductor.
        runtime: Where to report.
        collect: Is given the decisions of each call of a graph, and once those of each wrapper such as DDP: all that one step sends.

    Raises:
        ValueError: An option is unknown, or its value is not allowed.
    """
    config, patches = read_options(options)
    previewed: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        active = [(integration, target) for integration in INTEGRATIONS for target in integration.active()]
        reduced_outside = any(integration.averages for integration, _ in active)
        group = gradient_group(config, reduced_outside)
        for integration, target in active:
            if target not in previewed:
                decisions = integration.preview(target, config, runtime)
                if collect is not None:
                    collect(decisions)
                previewed.append(target)
        settings = Settings(phases_of(config)[-1].config, patches, group, runtime, _nothing_computed)
        note_unseen(example_inputs, runtime)
        compiler = GraphCompiler(gm, example_inputs, settings, reduced_outside=reduced_outside)
        compiled, requests = compiler.compile()
        entry = compiler.first_use.entry

        def run(*args: Any) -> Any:
            if collect is not None:
                collect(compiler.decisions)
            if entry is not None:  # one step: there is no forward between two of these backwards
                runtime.reports.serve(entry, [args[position] for position in compiler.parameter_positions])
                entry.backward_ran()
            return compiled(*args, *(tensor for request in requests for tensor in blank_state(request, args)))

        return run

    return backend


def _nothing_computed(gm: fx.GraphModule, _: Sequence[Any], **__: Any) -> Compiled:
    """In place of Inductor's code generation: returns zeros. What is only saved for a backward, which never runs, is left uninitialised."""
    output = gu.output_node(gm.graph)
    results: tuple[Any, ...] = output.args[0]  # type: ignore[assignment]
    # By name: torch 2.13 has two such classes, torch 2.11 one.
    saved = [type(item).__name__.startswith("SavedForBackwards") for item in output.meta.get("desc", ())] or [False] * len(results)

    def run(_: list[Any]) -> list[Any]:
        return [_stand_in(node, is_saved) for node, is_saved in zip(results, saved, strict=True)]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _stand_in(node: Any, is_saved: bool) -> Any:
    value = node.meta["val"] if isinstance(node, fx.Node) and "val" in node.meta else node
    if isinstance(value, fx.Node):  # a constant of Inductor's own passes: they leave it without a value, and it has no inputs
        value = value.target(*value.args, **value.kwargs)  # type: ignore[operator]
    if isinstance(value, torch.SymInt):
        return gu.hint(value)
    if not isinstance(value, Tensor):
        return value
    shape, strides = ([gu.hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
    tensor = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
    return tensor if is_saved else tensor.zero_()
