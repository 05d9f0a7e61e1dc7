"""Compiles one Dynamo graph: Inductor, with this project's passes in front of it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.distributed as dist
from torch import fx
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.distributed import ProcessGroup

from dct_compile.buckets import BUCKET_BYTES, bucket_bytes_on
from dct_compile.compiler.equal_start import with_equal_start
from dct_compile.compiler.exchanges import before_exchanges, with_count
from dct_compile.compiler.first_use import FirstUse
from dct_compile.compiler.inputs import describe_inputs, parameter_positions
from dct_compile.compiler.not_averaged import differentiated, plain_leaves
from dct_compile.compiler.refusals import refuse_ahead_of_time, refuse_cpp_wrapper
from dct_compile.compiler.spread import watchers
from dct_compile.compiler.state_inputs import add_state_inputs, with_state
from dct_compile.config import DCTConfig
from dct_compile.passes.decision import Decision
from dct_compile.passes.foresight import can_hold_sites
from dct_compile.passes.inline_kernels import InlineKernels
from dct_compile.passes.manager import JointGraphPass, StateNeededError, StateRequest, expected_requests
from dct_compile.reasons import Note
from dct_compile.runtime import Runtime

Compiled = Callable[..., Any]
JOINT_SLOT, _LAST_SLOT = "joint_custom_pre_pass", "post_grad_custom_post_pass"
_JOINT_PASSES = "use_joint_graph_passes"
_IN_ORDER = {"reorder_for_peak_memory": False}
"""Inductor sinks the start of an exchange to its wait otherwise, and nothing runs beside it."""


@dataclass(frozen=True)
class Settings:
    """The settings of one compilation.

    ``patches``: Inductor's own options. ``group``: the ranks that average gradients, for ``data_parallel``. ``inner_compile``: what
    generates code from the partitioned graphs. ``options``: the options with all phases, where ``config`` is one of several phases;
    ``until``: the exchange at which the next phase follows. ``bucket_bytes``: bytes of a bucket of ``data_parallel``, as on all ranks;
    ``None`` for what the link asks for.
    """

    config: DCTConfig
    patches: dict[str, Any]
    group: ProcessGroup | None
    runtime: Runtime
    inner_compile: Compiled = compile_fx_inner
    options: DCTConfig | None = None
    until: int | None = None
    bucket_bytes: int | None = None


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
        self.reduced_outside = reduced_outside
        self.is_reduced = reduced_outside or settings.group is not None or not dist.is_initialized() or dist.get_world_size() == 1
        self.ahead_of_time = functorch_config.bypass_autograd_cache_key
        self.backward_only = torch._dynamo.compiled_autograd.in_compiled_autograd_region
        self.inputs = describe_inputs(gm, example_inputs, self.group)
        self.parameter_positions = parameter_positions(example_inputs)
        compile_id = CompileContext.current_compile_id()
        self.name = f"graph {compile_id}" if compile_id is not None else "graph"
        self.trains_later = True
        """True if gradients are exchanged by a backward of its own, not by the graph itself."""
        self.bucket_bytes = BUCKET_BYTES
        self.requests: list[StateRequest] = []
        self.decisions: list[Decision] = []
        """The state that the graph needs and the decisions about it, once it is compiled."""
        self.compared = settings.options or settings.config
        self.first_use = FirstUse(self.compared, settings.runtime)

    def run(self) -> Compiled:
        """Returns the compiled graph, to be called with the graph's own inputs."""
        compiled, self.requests = self.compile()
        if self.requests:
            family = self.name.rpartition("/")[0]  # "graph 2/1" is the second compilation of one frame
            compiled = with_state(compiled, self.requests, self.runtime, family, None if self.trains_later else self.config)
        # One rank may evaluate alone: without gradients nothing waits for the others.
        if self.group is not None and torch.is_grad_enabled():
            compiled = with_equal_start(compiled, self.inputs, self.group, self.compared, self.runtime)
        return self.first_use.before_forward(compiled, self.parameter_positions)

    def compile(self) -> tuple[Compiled, list[StateRequest]]:
        """Returns the compiled graph and the state that it wants behind its own inputs."""
        if not self.reduced_outside:  # the names of others are those of their wrapper
            self.runtime.reports.patterns.look(self.config, [info.name for info in self.inputs if info.is_parameter])
        if self.group is None and not self.backward_only and not can_hold_sites(self.gm, self.example_inputs):
            self.runtime.reports.called = True
            self._note_training(any(info.is_trainable for info in self.inputs))
            return compile_graph(self.gm, self.example_inputs, self.settings.patches, self.settings.inner_compile), []
        self.bucket_bytes = self._bucket_bytes()
        requests = expected_requests(self.inputs, self.group, self.config, self.runtime, self.bucket_bytes)
        try:
            return self._attempt(requests), requests
        except StateNeededError as needed:
            return self._attempt(needed.requests), needed.requests

    def _bucket_bytes(self) -> int:
        """Returns the bytes of a bucket: those given, else those for the link, for which all ranks that train wait."""
        if self.settings.bucket_bytes is not None:
            return self.settings.bucket_bytes
        if self.group is None or not any(info.is_trainable for info in self.inputs):
            return BUCKET_BYTES
        link = self.runtime.links.of(self.group, self.config.link)
        gradient_bytes = sum(info.size for info in self.inputs if info.is_averaged)
        return bucket_bytes_on(link, self.group.size(), self.compared.dp_density, gradient_bytes)

    def _attempt(self, requests: list[StateRequest]) -> Compiled:
        if not self._setting(_JOINT_PASSES):
            raise ValueError(f"option {_JOINT_PASSES!r} is False (as in mode 'lite'): Inductor would not run the passes of backend 'dct'")
        joint_pass = self._joint_pass(requests)
        passes: dict[str, Any] = {JOINT_SLOT: joint_pass}
        if self.config.inline_kernels:
            passes[_LAST_SLOT] = InlineKernels(self._custom_passes(_LAST_SLOT))
        order = _IN_ORDER if self.group is not None else {}
        watched = watchers(self.inputs, joint_pass.reduced)
        gm, inputs = add_state_inputs(self.gm, self.example_inputs, requests, watched, always_copied=self.settings.options is not None)
        # The autograd cache would skip the passes on a warm start, and with them the report; Inductor's own cache stays on.
        # aot_compile never looks into the cache, but its result is made by it.
        with functorch_config.patch(enable_autograd_cache=self.ahead_of_time):
            compiled = compile_graph(gm, inputs, {**order, **self.settings.patches, **passes}, self._inner_compile(joint_pass))
        self.trains_later, self.decisions = joint_pass.training, joint_pass.decisions
        if not self.ahead_of_time:
            self.first_use.expect(joint_pass.decisions, joint_pass.training)
        if joint_pass.entry is not None:
            self.first_use.watch(joint_pass.entry)
        self._note_training(joint_pass.trains)
        self._note_left_alone(joint_pass.reduced)
        return compiled

    def _note_training(self, trains: bool) -> None:
        """Remembers whether gradients of parameters are left to somebody else, whom the report warns about."""
        self.runtime.reports.trains_alone |= trains and not self.is_reduced
        self.runtime.reports.has_shards |= any(info.spread.manager for info in self.inputs)

    def _note_left_alone(self, reduced: Collection[int]) -> None:
        """Reports the gradients that ``data_parallel`` does not average. ``reduced``: of which parameters DTensor reduces them."""
        if self.group is None:
            return
        trained = [(position, info) for position, info in enumerate(self.inputs) if info.is_trainable]
        left = {
            Note.SHARDED: [info.name for _, info in trained if info.spread.manager == "DTensor" and not info.spread.is_copy],
            Note.REDUCED_BY_FSDP: [info.name for _, info in trained if info.spread.manager == "FSDP" and not info.spread.is_copy],
            Note.REDUCED_BY_DTENSOR: [info.name for position, info in trained if position in reduced],
            Note.IN_THE_GRAPH: differentiated(self.gm, self.inputs),
            Note.NO_PARAMETERS: plain_leaves(self.gm, self.example_inputs, self.inputs),
        }
        for note, names in left.items():
            if names:
                self.runtime.warn_once(note.format(parameters=", ".join(names)))

    def _joint_pass(self, requests: list[StateRequest]) -> JointGraphPass:
        earlier = self._custom_passes(JOINT_SLOT)
        until = self.settings.until
        return JointGraphPass(
            self.name, self.config, self.inputs, requests, self.group, self.runtime, earlier, self.backward_only, until, self.bucket_bytes
        )

    def _inner_compile(self, joint_pass: JointGraphPass) -> Compiled:
        """Compiles a partitioned graph; a backward agrees with the other ranks before it runs for the first time."""
        # The function lives as long as the compiled graph. This object holds the parameters of the first call, which may die sooner.
        inner_compile, first_use, config, runtime = self.settings.inner_compile, self.first_use, self.config, self.runtime
        ahead_of_time, averages, options = self.ahead_of_time, self.group is not None, self.settings.options
        cpp_wrapper = self._setting("cpp_wrapper")

        def inner(gm: fx.GraphModule, inputs: Sequence[Any], **flags: Any) -> Any:
            if cpp_wrapper:
                refuse_cpp_wrapper(joint_pass.decisions)
            if ahead_of_time:
                refuse_ahead_of_time(joint_pass.decisions, averages)
                return inner_compile(gm, inputs, **flags)
            compiled = inner_compile(gm, inputs, **flags)
            if not flags.get("is_backward") or not joint_pass.decisions:
                return compiled
            if joint_pass.requests:
                compiled = before_exchanges(compiled, joint_pass.requests, config, runtime)
            compiled = first_use.before_backward(compiled)
            return compiled if options is None else with_count(compiled, joint_pass.decisions, options, runtime)

        return inner

    def _setting(self, name: str) -> Any:
        """Returns the value of an option of Inductor in this compilation."""
        return self.settings.patches.get(name, getattr(inductor_config, name))

    def _custom_passes(self, slot: str) -> list[Callable[[fx.Graph], None]]:
        """Returns a user's own passes: newer torch allows a list."""
        passes = self._setting(slot)
        if passes is None:
            return []
        return list(passes) if isinstance(passes, list | tuple) else [passes]
