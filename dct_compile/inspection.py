"""Finds the effect of backend "dct" on a model: compiles forward and backward, and runs neither."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed import ProcessGroup

# Registers the process-group backend "fake", whose collectives move nothing.
from torch.testing._internal.distributed.fake_pg import FakeStore

from dct_compile.dry_run import dry_run
from dct_compile.integrations import INTEGRATIONS
from dct_compile.passes.decision import Decision
from dct_compile.report import Report
from dct_compile.runtime import RUNTIME, Runtime
from dct_compile.workarounds.recompiles import counted_apart

DEFAULT_RANKS = 4


@contextmanager
def fake_ranks(ranks: int) -> Iterator[ProcessGroup]:
    """Makes this process rank 0 of ``ranks`` whose collectives move nothing, until the context ends.

    Args:
        ranks: The number of ranks, at least 1.

    Raises:
        ValueError: ``ranks`` is less than 1.
    """
    if ranks < 1:
        raise ValueError(f"{ranks} ranks were asked for; at least 1 is needed")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def explain(
    model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, ranks: int | None = None, **named_inputs: Any
) -> Report:
    """Reports the effect of ``torch.compile(model, backend="dct", options=options)`` on a call with these inputs.

    Forward and backward are compiled up to the graphs that Inductor would generate code from. Nothing is computed or sent. Code of
    ``model`` between two graphs (after a graph break) does run, on zeros. Parameters, buffers, gradients, torch's random generators and the
    state of DDP are the same afterwards. Shapes are those of the inputs, and none is dynamic.

    Args:
        model: The module or function to compile.
        inputs: The positional arguments of ``model``.
        options: The options of backend "dct" and of Inductor.
        ranks: The number of ranks to simulate where no process group is initialised, by default 4. Otherwise the group is used as it is,
            and each rank may make this call on its own.
        named_inputs: The keyword arguments of ``model``.

    Returns:
        The report of the graphs and of their collectives.

    Raises:
        ValueError: An option is not allowed, ``ranks`` is less than 1, or ``ranks`` differs from the size of the process group.
        TypeError: ``model`` cannot be called.
        Exception: Any error that ``model`` raises.
    """
    return inspected(model, inputs, named_inputs, options, ranks)[0]


def inspected(
    model: Callable[..., Any],
    inputs: tuple[Any, ...],
    named_inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    ranks: int | None = None,
) -> tuple[Report, list[Decision]]:
    """Returns the report of :func:`explain`, and the decisions about all that one step sends, one for each call of an exchange."""
    if not callable(model):
        raise TypeError(f"model is of type {type(model).__name__}; a torch.nn.Module or a function is expected")
    runtime = Runtime(links=RUNTIME.links.unmeasured())
    decisions: list[Decision] = []
    with ExitStack() as stack:
        if not dist.is_initialized():
            stack.enter_context(fake_ranks(DEFAULT_RANKS if ranks is None else ranks))
        elif ranks not in (None, dist.get_world_size()):
            raise ValueError(f"ranks is {ranks}, but a process group of {dist.get_world_size()} ranks is initialised: leave ranks out")
        model = stack.enter_context(undisturbed(model, (inputs, named_inputs)))
        stack.enter_context(dynamo_config.patch(fail_on_recompile_limit_hit=True))
        stack.enter_context(RUNTIME.reports.lending_counts(runtime.reports))
        apart = stack.enter_context(counted_apart())
        with torch.enable_grad():
            torch.compile(model, backend=dry_run(options, runtime, decisions.extend), dynamic=False, **apart)(*inputs, **named_inputs)
    return runtime.reports.snapshot(), decisions


@contextmanager
def undisturbed(model: Callable[..., Any], inputs: Any) -> Iterator[Callable[..., Any]]:
    """Yields ``model`` uncompiled: it may be run until the context ends, with gradients, and nothing is sent. Then all is as before.

    Args:
        model: The module or function.
        inputs: What it will be called with, in any structure.
    """
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    with _unchanged(model, inputs), _uncompiled(model):
        yield model


@contextmanager
def _uncompiled(model: Callable[..., Any]) -> Iterator[None]:
    """Turns parts of ``model`` that are compiled on their own into plain modules, until the context ends: their backend would run them."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    with ExitStack() as stack:
        for module in modules:
            stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None
            for name, child in module._modules.items():
                if isinstance(child, OptimizedModule):
                    stack.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = child._orig_mod
        yield


@contextmanager
def _unchanged(model: Callable[..., Any], inputs: Any) -> Iterator[None]:
    """Restores what running ``model`` once may change: tensors of the model and of ``inputs``, gradients, random generators, DDP."""
    tensors = [tensor for tensor in pytree.tree_leaves(inputs) if isinstance(tensor, Tensor)]
    if isinstance(model, nn.Module):
        tensors += [*model.parameters(), *model.buffers()]
    before = [(tensor, tensor._version, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices))
            if isinstance(model, nn.Module):
                for integration in INTEGRATIONS:
                    stack.enter_context(integration.paused(model))
            yield
    finally:
        with torch.no_grad():
            for tensor, version, values, gradient in before:
                if tensor._version != version:
                    tensor.copy_(values)
                tensor.grad = gradient
