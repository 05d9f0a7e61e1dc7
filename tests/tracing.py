"""Traces models through the real Dynamo, AOTAutograd and joint-graph hook of Inductor, under a fake process group, without code generation.

A trace takes a fraction of a second. The partitioned graphs are interpreted, with zeros for what a collective would receive.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from dct_compile.buckets import BUCKET_BYTES
from dct_compile.compiler.graph import JOINT_SLOT, GraphCompiler, Settings
from dct_compile.compiler.options import gradient_group
from dct_compile.compiler.state_inputs import add_state_inputs
from dct_compile.config import DCTConfig
from dct_compile.passes.context import has_descriptors
from dct_compile.passes.decision import Decision
from dct_compile.passes.graph_input import GraphInput
from dct_compile.passes.graph_utils import WAIT
from dct_compile.passes.manager import JointGraphPass, StateRequest
from dct_compile.report import Report
from dct_compile.runtime import Runtime

c10d, dct = torch.ops._c10d_functional, torch.ops.dct


@contextmanager
def fake_group(world_size: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    """A process group whose collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


@dataclass
class Trace:
    """One Dynamo graph as the passes left it.

    ``before`` and ``after`` are copies of the joint graph (of the forward alone without gradients); ``forward`` and ``backward`` what the
    partitioner made of it.
    """

    inputs: list[GraphInput]
    requests: list[StateRequest]
    before: fx.Graph = field(default_factory=fx.Graph)
    after: fx.Graph = field(default_factory=fx.Graph)
    forward: fx.Graph = field(default_factory=fx.Graph)
    backward: fx.Graph = field(default_factory=fx.Graph)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def kinds(self) -> list[tuple[str, str, str]]:
        """Collective, kind and origin of every site."""
        return [(item.exchange.collective.name, item.exchange.kind, item.exchange.origin) for item in self.decisions]

    @property
    def reasons(self) -> list[str]:
        return [decision.reason for decision in self.decisions]

    @property
    def schemes(self) -> list[str]:
        return [decision.scheme for decision in self.decisions]


class Tracer:
    """Compiles functions like backend "dct", with a runtime of its own, and keeps the traces."""

    def __init__(self) -> None:
        self.runtime = Runtime()
        self.traces: list[Trace] = []
        self.bucket_bytes = BUCKET_BYTES

    @property
    def report(self) -> Report:
        return self.runtime.reports.snapshot()

    def compile(self, function: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
        # Functions of tests often return what they exchange, and most are about masks.
        config = DCTConfig(**{"mp_outputs": True, "activation_codec": "threshold", **options})

        def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            group = gradient_group(config, reduced_outside=False)
            settings = Settings(config, {}, group, self.runtime, bucket_bytes=self.bucket_bytes)
            return _TracingCompiler(gm, inputs, settings, self.traces).run()

        compiled: Callable[..., Any] = torch.compile(function, backend=compile_graph, dynamic=dynamic)
        return compiled

    def trace(self, function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None, **options: Any) -> Trace:
        """Compiles and calls ``function``, and calls backward if there is one; it must be one Dynamo graph."""
        torch._dynamo.reset()
        already = len(self.traces)
        results = self.compile(function, dynamic, **options)(*inputs)
        backward(results)
        assert len(self.traces) == already + 1, "one Dynamo graph was expected"
        return self.traces[-1]


def trace(function: Callable[..., Any], *inputs: Any, ranks: int = 4, rank: int = 0, dynamic: bool | None = None, **options: Any) -> Trace:
    """:meth:`Tracer.trace` under a fake group of its own."""
    with fake_group(ranks, rank):
        return Tracer().trace(function, *inputs, dynamic=dynamic, **options)


def backward(results: Any) -> None:
    """Backward of the sum of everything that has a gradient."""
    losses = [result.sum() for result in pytree.tree_leaves(results) if isinstance(result, Tensor) and result.requires_grad]
    if losses:
        torch.stack(losses).sum().backward()


class _CapturingPass(JointGraphPass):
    """The product's pass; keeps the joint graph before and after."""

    captured: Trace

    def __call__(self, graph: fx.Graph) -> None:
        before = copy.deepcopy(graph)
        super().__call__(graph)
        if has_descriptors(graph):
            self.captured.before, self.captured.after, self.captured.decisions = before, copy.deepcopy(graph), self.decisions


class _TracingCompiler(GraphCompiler):
    """The product's compiler, with an interpreter in place of Inductor's code generation."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings, traces: list[Trace]) -> None:
        super().__init__(gm, inputs, settings)
        self.traces = traces

    def _attempt(self, requests: list[StateRequest]) -> Callable[..., Any]:
        captured = Trace(self.inputs, requests)
        given = {"backward_only": self.backward_only, "bucket_bytes": self.bucket_bytes}
        joint_pass = _CapturingPass(self.name, self.config, self.inputs, requests, self.group, self.runtime, [], **given)
        joint_pass.captured = captured

        def interpret(gm: fx.GraphModule, _: Sequence[Any], **flags: Any) -> Callable[..., Any]:
            if flags.get("is_backward"):
                captured.backward = gm.graph
            else:
                captured.forward = gm.graph
            return make_boxed_func(_NothingReceived(gm).run)

        gm, inputs = add_state_inputs(self.gm, self.example_inputs, requests)
        with functorch_config.patch(enable_autograd_cache=False):
            compiled = compile_fx(gm, inputs, inner_compile=interpret, config_patches={JOINT_SLOT: joint_pass})  # type: ignore[arg-type]
        self.traces.append(captured)
        assert callable(compiled)
        return compiled


class _NothingReceived(fx.Interpreter):
    """A fake group leaves a collective's result uninitialised; zeros are a valid payload of every codec."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        is_collective = isinstance(target, torch._ops.OpOverload) and target.namespace == "_c10d_functional" and target is not WAIT
        return pytree.tree_map_only(Tensor, torch.zeros_like, result) if is_collective else result


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def outputs(graph: fx.Graph) -> list[Any]:
    """What the graph returns."""
    return list(next(node for node in graph.nodes if node.op == "output").args[0])


def nodes_of(graph: fx.Graph, target: Any) -> list[fx.Node]:
    """The nodes that call ``target``, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def communication(graph: fx.Graph) -> Mapping[Any, int]:
    """How often each collective and each of this project's operators is called; waits are counted too."""
    return Counter(
        node.target
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("_c10d_functional", "dct")
    )
