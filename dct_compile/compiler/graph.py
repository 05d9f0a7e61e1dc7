"""Compiles one Dynamo graph: Inductor, with this project's passes in front of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.distributed as dist
from torch import Tensor, fx
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from dct_compile.compiler.first_use import FirstUse
from dct_compile.compiler.state_inputs import add_state_inputs, with_equal_start, with_state
from dct_compile.config import DCTConfig
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.context import GraphInput
from dct_compile.passes.foresight import can_hold_sites
from dct_compile.passes.inline_kernels import InlineKernels
from dct_compile.passes.manager import JointGraphPass, StateNeededError, StateRequest, expected_requests
from dct_compile.passes.plan import Decision
from dct_compile.runtime import Runtime

Compiled = Callable[..., Any]
JOINT_SLOT, _LAST_SLOT = "joint_custom_pre_pass", "post_grad_custom_post_pass"
_JOINT_PASSES = "use_joint_graph_passes"


@dataclass(frozen=True)
class Settings:
    """The settings of one compilation.

    ``patches``: Inductor's own options. ``group``: the ranks that average gradients, for ``data_parallel``. ``inner_compile``: what
    generates code from the partitioned graphs.
    """

    config: DCTConfig
    patches: dict[str, Any]
    group: ProcessGroup | None
    runtime: Runtime
    inner_compile: Compiled = compile_fx_inner


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any], inner_compile: Compiled = compile_fx_inner
) -> Compiled:
    """Compiles ``gm`` as Inductor does, with its options ``patches``."""
    compiled = compile_fx(gm, list(inputs), inner_compile, patches)
    assert callable(compiled)
    return compiled


class GraphCompiler:
    """Compiles one Dynamo graph.

    The graph is traced a second time only where its gradient sites need state that could not be foretold from its parameters.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings, *, reduced_outside: bool = False) -> None:
        self.gm, self.example_inputs, self.settings = gm, example_inputs, settings
        self.config, self.group, self.runtime = settings.config, settings.group, settings.runtime
        self.is_reduced = reduced_outside or settings.group is not None or dist.get_world_size() == 1
        self.ahead_of_time = functorch_config.bypass_autograd_cache_key
        self.backward_only = torch._dynamo.compiled_autograd.in_compiled_autograd_region
        self.inputs = [_describe(node, example) for node, example in zip(gu.placeholders(gm.graph), example_inputs, strict=True)]
        self.parameter_positions = [position for position, info in enumerate(self.inputs) if info.is_parameter]
        compile_id = CompileContext.current_compile_id()
        self.name = f"graph {compile_id}" if compile_id is not None else "graph"
        self.first_use = FirstUse(settings.config, settings.runtime)

    def run(self) -> Compiled:
        """Returns the compiled graph, to be called with the graph's own inputs."""
        compiled, requests = self.compile()
        if requests:
            compiled = with_state(compiled, requests, self.runtime)
        if self.group is not None:
            compiled = with_equal_start(compiled, self.parameter_positions, self.group, self.runtime)
        return self.first_use.before_forward(compiled, self.parameter_positions)

    def compile(self) -> tuple[Compiled, list[StateRequest]]:
        """Returns the compiled graph and the state that it wants behind its own inputs."""
        if self.group is None and not self.backward_only and not can_hold_sites(self.gm, self.example_inputs):
            self.runtime.reports.called = True
            self._note_training(any(info.is_trainable for info in self.inputs))
            return compile_graph(self.gm, self.example_inputs, self.settings.patches, self.settings.inner_compile), []
        requests = expected_requests(self.inputs, self.group, self.config)
        try:
            return self._attempt(requests), requests
        except StateNeededError as needed:
            return self._attempt(needed.requests), needed.requests

    def _attempt(self, requests: list[StateRequest]) -> Compiled:
        if not self.settings.patches.get(_JOINT_PASSES, getattr(inductor_config, _JOINT_PASSES)):
            raise ValueError(f"option {_JOINT_PASSES!r} is False (as in mode 'lite'): Inductor would not run the passes of backend 'dct'")
        joint_pass = self._joint_pass(requests)
        passes: dict[str, Any] = {JOINT_SLOT: joint_pass}
        if self.config.inline_kernels:
            passes[_LAST_SLOT] = InlineKernels(self._custom_passes(_LAST_SLOT))
        gm, inputs = add_state_inputs(self.gm, self.example_inputs, requests)
        # The autograd cache would skip the passes on a warm start, and with them the report; Inductor's own cache stays on.
        # aot_compile never looks into the cache, but its result is made by it.
        with functorch_config.patch(enable_autograd_cache=self.ahead_of_time):
            compiled = compile_graph(gm, inputs, {**self.settings.patches, **passes}, self._inner_compile(joint_pass))
        if not self.ahead_of_time:
            self.first_use.expect(joint_pass.decisions, joint_pass.training)
        self._note_training(joint_pass.trains)
        return compiled

    def _refuse_ahead_of_time(self, decisions: Sequence[Decision]) -> None:
        """Raises ``RuntimeError`` where a saved graph would lack what happens around it in this process."""
        chosen = [decision.exchange.label for decision in decisions if decision.compressed]
        if self.group is not None:
            raise RuntimeError("aot_compile cannot save a graph with option 'data_parallel': parameters are made equal when it first runs")
        if chosen:
            raise RuntimeError(
                f"aot_compile cannot save a graph with compressed exchanges, on which the ranks must agree when it first runs: {chosen}. "
                "Call the compiled model instead, or leave them dense (options 'exempt', 'mp_density': 1, 'embedding_codec': 'dense')"
            )

    def _note_training(self, trains: bool) -> None:
        """Remembers whether gradients of parameters are left to somebody else, whom the report warns about."""
        self.runtime.reports.trains_alone |= trains and not self.is_reduced

    def _joint_pass(self, requests: list[StateRequest]) -> JointGraphPass:
        earlier = self._custom_passes(JOINT_SLOT)
        return JointGraphPass(self.name, self.config, self.inputs, requests, self.group, self.runtime, earlier, self.backward_only)

    def _inner_compile(self, joint_pass: JointGraphPass) -> Compiled:
        """Compiles a partitioned graph; a backward agrees with the other ranks before it runs for the first time."""

        def inner(gm: fx.GraphModule, inputs: Sequence[Any], **flags: Any) -> Any:
            if self.ahead_of_time:
                self._refuse_ahead_of_time(joint_pass.decisions)
                return self.settings.inner_compile(gm, inputs, **flags)
            compiled = self.settings.inner_compile(gm, inputs, **flags)
            return self.first_use.before_backward(compiled) if flags.get("is_backward") and joint_pass.decisions else compiled

        return inner

    def _custom_passes(self, slot: str) -> list[Callable[[fx.Graph], None]]:
        """Returns a user's own passes: newer torch allows a list."""
        passes = self.settings.patches.get(slot, getattr(inductor_config, slot))
        if passes is None:
            return []
        return list(passes) if isinstance(passes, list | tuple) else [passes]


def _describe(node: fx.Node, example: Any) -> GraphInput:
    source = getattr(node, "_dynamo_source", None)
    name = _readable_source(source.name) if source is not None else node.name
    if not isinstance(example, Tensor):
        return GraphInput(name, None, (), False, False, False)
    is_parameter = isinstance(example, torch.nn.Parameter)
    is_foreign = not is_parameter and (source is None or example.grad_fn is not None or "___stack" in name)
    is_trainable = is_parameter and example.requires_grad and torch.is_grad_enabled()
    local = example._local_tensor if isinstance(example, DTensor) else example
    shape = tuple(gu.hint(size) for size in local.shape)
    return GraphInput(name, example.dtype, shape, is_parameter, is_trainable, is_foreign)


def _readable_source(source: str) -> str:
    """Returns a source such as ``L['self']._modules['top']._parameters['weight']`` as a name: ``top.weight``."""
    parts = [part.strip("'\"") for chunk in source.split("[")[1:] for part in [chunk.split("]")[0]]]
    return ".".join(parts[1:]) if len(parts) > 1 else source
