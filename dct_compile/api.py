"""The functions of the public face: each does its work on the process-wide state."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from dct_compile.optim import first_moment_of
from dct_compile.report import Report
from dct_compile.runtime import RUNTIME
from dct_compile.state.entry import Entry
from dct_compile.state.ranks import StateDict, rank_of, state_for


def report() -> Report:
    """Returns the report of all compilations by backend "dct" in this process, with the densities achieved so far.

    ``str(report())`` is a table.
    """
    return RUNTIME.report()


def reset_report() -> None:
    """Forgets the reports so far. Graphs that are already compiled go on, and are not reported again."""
    RUNTIME.reports.clear()


def state_dict(model: nn.Module, group: ProcessGroup | None = None) -> StateDict:
    """Returns this rank's compressor state. Every rank has its own state to save.

    Give it to ``torch.save``, with a file for each rank, or to ``torch.distributed.checkpoint.save`` as a value of the outermost dict.

    Args:
        model: The model whose parameters are compressed.
        group: The ranks that average its gradients. By default those of its DDP module, else all.

    Returns:
        Copies of residuals (float32 [numel], row-major), thresholds and counters, keyed by parameter name.
    """
    return StateDict(RUNTIME.states.state_dict(model), *rank_of(model, group))


def load_state_dict(
    model: nn.Module, state: Mapping[str, Entry] | Sequence[Mapping[str, Entry]], group: ProcessGroup | None = None
) -> None:
    """Restores results of :func:`state_dict`, before or after the first compilation.

    A list may come from another number of ranks. Then the mean of the residuals over the ranks stays the same: see docs/checkpoints.md.

    Args:
        model: The model that the state belongs to.
        state: The state that this rank saved, or a list with those of all ranks that saved one. An empty dict resets the model's state.
        group: The ranks that average its gradients. By default those of its DDP module, else all.

    Raises:
        ValueError: The state has a parameter that the model does not have, is damaged, or belongs to another rank. Nothing is loaded then.
    """
    RUNTIME.states.load_state_dict(model, state_for(state, *rank_of(model, group)))


def adapt(optimizer: Optimizer) -> None:
    """Lets ``optimizer`` bypass its first moment for compressed parameters, as option ``first_moment="bypass"`` does for all optimizers.

    For those who set ``first_moment="keep"``.

    Args:
        optimizer: An optimizer whose first moment is known, see :mod:`dct_compile.optim`.

    Raises:
        TypeError: Its first moment is not known.
    """
    if first_moment_of(optimizer) is None:
        raise TypeError(
            f"the first moment of {type(optimizer).__name__} is not known; allowed are Adam, AdamW, NAdam, RAdam, Adamax, SGD, classes that"
            " inherit the step of one of them, and what dct_compile.optim.register_first_moment has declared"
        )
    RUNTIME.bypass.adapted.add(optimizer)


def discard_gradients(model: nn.Module) -> None:
    """Discards the gradients of ``model``: sets them to ``None``, and takes back what their exchange has left in the residuals.

    Not needed where an optimizer of torch has the parameters: then ``zero_grad`` without a step does the same from the next backward on.

    Args:
        model: The model, with or without the wrappers of DDP and torch.compile.

    Raises:
        RuntimeError: Option ``undo_discarded`` is False.
    """
    RUNTIME.states.discard(model)
    for parameter in model.parameters():
        parameter.grad = None


def drain(model: nn.Module) -> None:
    """Ends what is under way with option ``arrival="late"``: waits for it, and hands the means that no gradient has joined yet back.

    Each rank adds them to its own residual, so nothing is lost: they are sent again with the next gradients. Call it where what was
    computed so far should not meet what comes next, as before another loss. It is not needed at the end of a training, nor before
    :func:`state_dict`.

    Args:
        model: The model, with or without the wrappers of DDP and torch.compile. Every rank that averages its gradients makes this call,
            between the same two steps.

    Raises:
        Exception: The error of an exchange that has failed meanwhile.
    """
    RUNTIME.states.drain(model)


def scale_residuals(model: nn.Module, factor: float) -> None:
    """Multiplies what waits to be sent: call it where your own loss scale changes.

    Not needed with losses of :meth:`torch.amp.GradScaler.scale`, whose factor is followed.

    Args:
        model: The model, with or without the wrappers of DDP and torch.compile.
        factor: The new scale of the loss over the old one.

    Raises:
        ValueError: ``factor`` is not a finite number above 0.
    """
    if not 0.0 < factor < float("inf"):
        raise ValueError(f"factor is {factor!r}; allowed is a finite number above 0: the new scale of the loss over the old one")
    RUNTIME.states.multiply(model, factor)
