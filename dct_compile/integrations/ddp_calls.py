"""Finds the DDP modules that a call concerns: those whose forward is running, and the parts of the compiled model that is running."""

import inspect
from collections.abc import Iterator
from types import FrameType

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def running_modules() -> list[DistributedDataParallel]:
    """Returns the DDP modules whose ``forward`` is running in this thread, innermost first."""
    forward = DistributedDataParallel.forward.__code__
    return [frame.f_locals["self"] for frame in _frames() if frame.f_code is forward]


def parts_of_compiled_model() -> list[DistributedDataParallel]:
    """Returns the DDP modules in the innermost model on this thread's stack that ``torch.compile`` was given.

    Those inside of other DDP modules are left out. One of them may have no compiled graph of its own: torch skips its own modules, such as
    ``nn.Sequential``, when DDP calls them.
    """
    call = nn.Module._wrapped_call_impl.__code__
    for frame in _frames():
        if frame.f_code is call:
            module: nn.Module = frame.f_locals["self"]
            if isinstance(module, OptimizedModule) or module._compiled_call_impl is not None:
                return list(_parts(module))
    return []


def _parts(model: nn.Module) -> Iterator[DistributedDataParallel]:
    for child in model.children():
        if isinstance(child, DistributedDataParallel):
            yield child
        else:
            yield from _parts(child)


def _frames() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
