"""FSDP2 (``fully_shard``): it gathers parameters and reduces gradients in hooks, outside of every graph. Objects of ours take their place.

A target is the root of a model that ``fully_shard`` was applied to: the module whose forward begins a step. All of its parameter groups are
attached together, at the first call of a compiled graph inside of its forward. All ranks run that forward, so they agree there. What was
gathered before is dense. Every such call looks whether other parameters are trained than before (``fsdp_attached.py``).
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.utils.weak import WeakTensorKeyDictionary

from dct_compile.config import SHARD_OPTIONS, DCTConfig
from dct_compile.integrations.fsdp_attached import Attached, class_of
from dct_compile.integrations.interface import Compiled
from dct_compile.integrations.other_options import note_other_options
from dct_compile.passes.decision import Decision
from dct_compile.runtime import Runtime
from dct_compile.workarounds import gloo


class FSDPIntegration:
    """The integration of ``fully_shard``."""

    averages = False

    def active(self) -> list[nn.Module]:
        # A module that is called after the forward, as the head of a chunked loss is, begins an iteration of its own. Its root is the same.
        contexts = {id(state._state_ctx): state._state_ctx for state in _states() if state._state_ctx.iter_forward_root is not None}
        return [state._modules[0] for context in contexts.values() for state in context.all_states if state._is_root]

    def attach(self, target: nn.Module, config: DCTConfig, runtime: Runtime) -> None:
        held: Attached | None = runtime.attached.get(target)
        if held is None:
            gloo.shorten_names()
            held = Attached(target, _groups(target), config, runtime)
            held.follow()
            runtime.attached[target] = held  # not before: a forward after an error tries again
        else:
            note_other_options(class_of(target), "FSDP", held.config, config, SHARD_OPTIONS, runtime)
            held.follow()

    def attach_at_calls(self, compiled: Compiled, positions: Sequence[int], config: DCTConfig, runtime: Runtime) -> Compiled:
        around = WeakTensorKeyDictionary()

        def run(*args: Any) -> Any:
            # A graph with parameters is looked at once for each set of them: the modules around it stay the same.
            first = args[positions[0]] if positions else None
            if first is None or first not in around:
                targets = self.active()
                for target in targets:
                    self.attach(target, config, runtime)
                if first is not None:
                    around[first] = [weakref.ref(target) for target in targets]
            else:
                for ref in around[first]:
                    _follow(ref(), runtime)
            return compiled(*args)

        if hasattr(compiled, "serialize"):  # ahead-of-time compilation stores the graph itself
            run.serialize = compiled.serialize  # type: ignore[attr-defined]
        return run

    def preview(self, target: nn.Module, config: DCTConfig, runtime: Runtime) -> list[Decision]:
        return Attached(target, _groups(target), config, runtime).preview()

    def paused(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # a forward alone prepares nothing


def _follow(target: nn.Module | None, runtime: Runtime) -> None:
    """Looks whether other parameters of ``target`` are trained than before."""
    held: Attached | None = runtime.attached.get(target) if target is not None else None
    if held is not None:
        held.follow()


def _groups(target: nn.Module) -> list[Any]:
    """Returns the parameter groups of a model, in the order of its modules."""
    (state,) = [state for state in _states() if target in state._modules]
    return [group for inner in state._state_ctx.all_states for group in inner._fsdp_param_groups]


def _states() -> Iterator[Any]:
    """Yields the states that ``fully_shard`` has given to modules of this process."""
    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        if hasattr(state, "_fsdp_param_groups"):
            yield state
