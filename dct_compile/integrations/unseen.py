"""Names the collectives that neither a graph nor an integration sees, where it is known that there are some."""

import inspect
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from dct_compile.reasons import Note, Unseen
from dct_compile.runtime import Runtime

_WRAPPERS = {"torch.distributed.fsdp.fully_sharded_data_parallel": Unseen.FSDP}
"""By the package of a class whose method is running while its part of the model is compiled."""


def note_unseen(example_inputs: Sequence[Any], runtime: Runtime) -> None:
    """Adds a note for each kind of collective that is outside of everything that the report counts.

    Args:
        example_inputs: The inputs of the graph that is being compiled.
        runtime: The owner of the report.
    """
    found = set(_running())
    if any(isinstance(item, DTensor) and isinstance(item, nn.Parameter) for item in example_inputs):
        found.add(Unseen.DTENSOR)
    for what in Unseen:
        if what in found:
            runtime.reports.note(Note.UNSEEN.format(what=what))


def _running() -> Iterator[Unseen]:
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        # Only frames of torch, which end with the call: a frame keeps what f_locals has shown, such as a user's model, until it ends.
        if frame.f_globals.get("__name__", "").startswith("torch."):
            # By name: importing FSDP takes long, and who uses it has done so.
            for base in type(frame.f_locals.get("self")).__mro__:
                yield from (what for package, what in _WRAPPERS.items() if base.__module__.startswith(package))
        frame = frame.f_back
