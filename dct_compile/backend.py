"""``torch.compile(model, backend="dct")``: Inductor with DCT's passes in front of it."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.distributed as dist
from torch import Tensor, fx
from torch._dynamo.output_graph import GraphCompileReason
from torch._guards import CompileContext, detect_fake_mode
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from dct_compile.config import DCTConfig, split_options
from dct_compile.integrations import ddp, gloo
from dct_compile.passes.graph_utils import hint, output_node, resolve_group
from dct_compile.passes.inline_kernels import InlineKernels
from dct_compile.passes.manager import GraphInput, JointGraphPass, StateNeededError, StateRequest
from dct_compile.passes.plan import Decision
from dct_compile.passes.reasons import Note
from dct_compile.passes.source import innermost_line
from dct_compile.runtime import RUNTIME, Runtime
from dct_compile.state import STATE_INPUTS, BucketState, local_tensor
from dct_compile.triton_kernels.compat import HAS_TRITON

Compiled = Callable[..., Any]
_JOINT_SLOT, _LAST_SLOT = "joint_custom_pre_pass", "post_grad_custom_post_pass"


def dct(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None, **_: Any
) -> Compiled:
    """Compiles one Dynamo graph. ``options``: fields of :class:`DCTConfig` beside any Inductor option; ``mode`` as for Inductor.

    Raises ``ValueError`` for an unknown option or a bad value. Without an initialised process group the graph is compiled as by Inductor.
    """
    config, patches = _split_options(options)
    if mode not in (None, "default"):
        patches = {**list_mode_options(mode), **patches}
    if not dist.is_available() or not dist.is_initialized():
        RUNTIME.reports.called = True
        RUNTIME.tell(Note.NO_PROCESS_GROUP)
        return _compile(gm, example_inputs, patches)
    gloo.shorten_names()
    modules = ddp.enclosing_modules()
    group = _gradient_group(config, bool(modules))
    for module in modules:
        ddp.attach(module, config, RUNTIME)
    _tell_graph_break(gm, RUNTIME)
    compiler = _GraphCompiler(gm, example_inputs, config, patches, group, RUNTIME, inside_ddp=bool(modules))
    return ddp.watched(compiler.run(), modules, compiler.parameter_positions)


def dry_run(options: Mapping[str, Any] | None, runtime: Runtime) -> Compiled:
    """A backend that compiles as :func:`dct` does, up to the graphs that Inductor would generate code from.

    What it finds is reported to ``runtime``. What it compiles computes nothing: outputs are zeros of the right shape. Nothing is attached
    to a DDP module and nothing is exchanged with other ranks. Raises ``ValueError`` as :func:`dct`. Needs a process group.
    """
    config, patches = _split_options(options)
    foreseen: list[DistributedDataParallel] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        modules = ddp.enclosing_modules()
        group = _gradient_group(config, bool(modules))
        for module in modules:
            if module not in foreseen:
                ddp.foresee(module, config, runtime)
                foreseen.append(module)
        arguments = (gm, example_inputs, config, patches, group, runtime)
        compiled, requests, _ = _GraphCompiler(*arguments, inside_ddp=bool(modules), inner_compile=_nothing_computed).compile()
        return lambda *args: compiled(*args, *(tensor for request in requests for tensor in _blank_state(request, args)))

    return backend


def _nothing_computed(gm: fx.GraphModule, _: Sequence[Any], **__: Any) -> Compiled:
    """In place of Inductor's code generation: returns zeros. What is only saved for a backward, which never runs, is left uninitialised."""
    output = output_node(gm.graph)
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
        return hint(value)
    if not isinstance(value, Tensor):
        return value
    shape, strides = ([hint(size) for size in sizes] for sizes in (value.shape, value.stride()))
    tensor = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
    return tensor if is_saved else tensor.zero_()


def _split_options(options: Mapping[str, Any] | None) -> tuple[DCTConfig, dict[str, Any]]:
    config, patches = split_options(options, list_options())
    if config.inline_kernels and not HAS_TRITON:
        raise ValueError("option 'inline_kernels' is True, but Triton is not installed: there are no kernels to inline")
    _check_inductor_types(patches)
    return config, patches


def _check_inductor_types(patches: Mapping[str, Any]) -> None:
    current = inductor_config.get_config_copy()
    for key, value in patches.items():
        default = current[key]
        if isinstance(default, bool | int | float | str) and not isinstance(value, type(default)):
            raise ValueError(f"option {key!r} is {value!r} ({type(value).__name__}); Inductor expects {type(default).__name__}")


def _tell_graph_break(gm: fx.GraphModule, runtime: Runtime) -> None:
    """What Dynamo could not trace runs between this graph and the next, unseen."""
    ended: GraphCompileReason | None = getattr(gm, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return
    line = innermost_line("".join(traceback.format_list(ended.user_stack)))
    if line is None:  # torch cut it itself, as at DDP's buckets; all of it is compiled
        return
    cause = ended.reason.splitlines()[0].rstrip(".")
    template = Note.ASYNC_COLLECTIVE if "async_op=True" in cause else Note.GRAPH_BREAK
    runtime.tell(template.format(line=line, cause=cause))


def _gradient_group(config: DCTConfig, inside_ddp: bool) -> ProcessGroup | None:
    if config.data_parallel is False:
        return None
    if inside_ddp:
        raise ValueError(
            "option 'data_parallel' is set and the model is wrapped in DDP: gradients would be averaged twice; remove one of the two"
        )
    group = dist.group.WORLD if config.data_parallel is True else config.data_parallel
    assert isinstance(group, ProcessGroup)
    return group


def _compile(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], inner_compile: Callable[..., Any] = compile_fx_inner
) -> Compiled:
    compiled = compile_fx(gm, list(inputs), inner_compile, patches)
    assert callable(compiled)
    return compiled


class _GraphCompiler:
    """Compiles one Dynamo graph; traces it a second time when its gradient sites turn out to need state inputs."""

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        config: DCTConfig,
        patches: dict[str, Any],
        group: ProcessGroup | None,
        runtime: Runtime,
        *,
        inside_ddp: bool = False,
        inner_compile: Callable[..., Any] = compile_fx_inner,
    ) -> None:
        self.gm, self.example_inputs, self.config, self.group, self.runtime = gm, example_inputs, config, group, runtime
        self.patches, self.inner_compile = patches, inner_compile
        self.is_reduced = inside_ddp or group is not None or dist.get_world_size() == 1
        self.backward_only = torch._dynamo.compiled_autograd.in_compiled_autograd_region
        self.inputs = [_describe(node, example) for node, example in zip(_placeholders(gm), example_inputs, strict=True)]
        self.parameter_positions = [position for position, info in enumerate(self.inputs) if info.is_parameter]
        compile_id = CompileContext.current_compile_id()
        self.name = f"graph {compile_id}" if compile_id is not None else "graph"

    def run(self) -> Compiled:
        """The compiled graph, to be called with the graph's own inputs."""
        compiled, requests, decisions = self.compile()
        self._agree(decisions)
        if requests:
            compiled = _with_state(compiled, requests, self.runtime)
        return compiled if self.group is None else _with_equal_start(compiled, self.parameter_positions, self.group, self.runtime)

    def compile(self) -> tuple[Compiled, list[StateRequest], list[Decision]]:
        """The compiled graph, the state that it wants behind its own inputs, and what was decided."""
        requests: list[StateRequest] = []
        while True:
            try:
                compiled, decisions = self._attempt(requests)
            except StateNeededError as needed:
                if requests:
                    raise
                requests = needed.requests
            else:
                return compiled, requests, decisions

    def _attempt(self, requests: list[StateRequest]) -> tuple[Compiled, list[Decision]]:
        earlier = self._custom_passes(_JOINT_SLOT)
        joint_pass = JointGraphPass(self.name, self.config, self.inputs, requests, self.group, self.runtime, earlier, self.backward_only)
        passes: dict[str, Any] = {_JOINT_SLOT: joint_pass}
        if self.config.inline_kernels:
            passes[_LAST_SLOT] = InlineKernels(self._custom_passes(_LAST_SLOT))
        gm, inputs = add_state_inputs(self.gm, self.example_inputs, requests)
        # The autograd cache would skip the passes on a warm start, and with them the report; Inductor's own cache stays on.
        with functorch_config.patch(enable_autograd_cache=False):
            compiled = _compile(gm, inputs, {**self.patches, **passes}, self.inner_compile)
        self.runtime.reports.trains_alone |= joint_pass.trains and not self.is_reduced
        return compiled, joint_pass.decisions

    def _custom_passes(self, slot: str) -> list[Callable[[fx.Graph], None]]:
        """A user's own passes: newer torch allows a list."""
        passes = self.patches.get(slot, getattr(inductor_config, slot))
        if passes is None:
            return []
        return list(passes) if isinstance(passes, list | tuple) else [passes]

    def _agree(self, decisions: Sequence[Decision]) -> None:
        for name in dict.fromkeys(decision.site.group_name for decision in decisions):
            signatures = [item.signature() for item in decisions if item.site.group_name == name]
            self.runtime.agreement.check(resolve_group(name), self.config, signatures)


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _describe(node: fx.Node, example: Any) -> GraphInput:
    source = getattr(node, "_dynamo_source", None)
    name = _readable_source(source.name) if source is not None else node.name
    if not isinstance(example, Tensor):
        return GraphInput(name, None, False, False, False)
    is_parameter = isinstance(example, torch.nn.Parameter)
    is_foreign = not is_parameter and (source is None or example.grad_fn is not None or "___stack" in name)
    return GraphInput(name, example.dtype, is_parameter, is_parameter and example.requires_grad and torch.is_grad_enabled(), is_foreign)


def _readable_source(source: str) -> str:
    """A source such as ``L['self']._modules['top']._parameters['weight']`` as a name: ``top.weight``."""
    parts = [part.strip("'\"") for chunk in source.split("[")[1:] for part in [chunk.split("]")[0]]]
    return ".".join(parts[1:]) if len(parts) > 1 else source


def add_state_inputs(gm: fx.GraphModule, inputs: Sequence[Any], requests: Sequence[StateRequest]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of a Dynamo graph with placeholders for the state of ``requests`` behind its own, and example inputs to match.

    Dynamo goes on using its own graph, so that one is not touched.
    """
    if not requests:
        return gm, list(inputs)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    last_placeholder = _placeholders(gm)[-1]
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            copies[node]._dynamo_source = node._dynamo_source
        if node is last_placeholder:
            for index, request in enumerate(requests):
                for name in STATE_INPUTS[: request.tensor_count]:
                    added = graph.placeholder(f"dct_{name}_{index}")
                    added._dynamo_source = None
                    added.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    copy._param_name_to_source = gm._param_name_to_source
    with detect_fake_mode(list(inputs)) or nullcontext():
        return copy, [*inputs, *(tensor for request in requests for tensor in _blank_state(request, inputs))]


def _blank_state(request: StateRequest, inputs: Sequence[Any]) -> list[Tensor]:
    """Tensors of the shapes that ``request`` wants, for a graph that is called with ``inputs``."""
    return BucketState([], request.layout, request.owner_layout, inputs[request.positions[0]].device).tensors()


def _with_state(compiled: Compiled, requests: Sequence[StateRequest], runtime: Runtime) -> Compiled:
    """Appends the state of the parameters that a call is made with: one compiled graph may serve several layers."""

    def run(*args: Any) -> Any:
        state: list[Tensor] = []
        for request in requests:
            bucket = runtime.states.bucket([args[position] for position in request.positions], request.layout, request.owner_layout)
            if bucket not in request.buckets:
                request.buckets.append(bucket)
            state.extend(bucket.tensors())
        return compiled(*args, *state)

    return run


def _with_equal_start(compiled: Compiled, positions: Sequence[int], group: ProcessGroup, runtime: Runtime) -> Compiled:
    """Makes parameters equal on all ranks of ``group`` before they are used for the first time, as DDP does."""

    def run(*args: Any) -> Any:
        for parameter in (args[position] for position in positions):
            if parameter not in runtime.synchronised:
                runtime.synchronised[parameter] = True
                with torch.no_grad():
                    dist.broadcast(local_tensor(parameter), group=group, group_src=0)
        return compiled(*args)

    return run
