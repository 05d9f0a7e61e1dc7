"""Makes parameters equal on all ranks before their first training step, as DDP does when it wraps a model (``data_parallel``)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import _broadcast_coalesced
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from dct_compile.buckets import BUCKET_BYTES
from dct_compile.config import DCTConfig
from dct_compile.element_order import local_tensor
from dct_compile.passes.graph_input import GraphInput
from dct_compile.posts import Signature
from dct_compile.runtime import Runtime

Compiled = Callable[..., Any]
_ADVICE = (
    "Option 'data_parallel' makes parameters equal before the first forward that runs with gradients enabled. All ranks of the group must"
    " run that forward, with parameters of the same shapes. Run a forward of one rank alone under torch.no_grad(). Compile what only some"
    " ranks hold, such as a stage of a pipeline or an expert, without the option or with a group of the ranks that hold it."
)


def with_equal_start(
    compiled: Compiled, inputs: Sequence[GraphInput], group: ProcessGroup, config: DCTConfig, runtime: Runtime
) -> Compiled:
    """Returns ``compiled``, which first gives the ranks of ``group`` the values that its first rank has.

    The ranks compare the parameters before they send any. A parameter that is not a copy on every rank is left alone.

    Args:
        compiled: The compiled graph. Every rank of ``group`` calls it.
        inputs: The inputs of the graph, in the order of the arguments.
        group: The ranks that average gradients.
        config: The options; named in an error where they differ.
        runtime: Knows the parameters that are equal already.
    """
    names = {position: info.name for position, info in enumerate(inputs) if info.is_parameter and info.spread.is_copy}

    def run(*args: Any) -> Any:
        fresh = [(name, args[position]) for position, name in names.items() if args[position] not in runtime.synchronised]
        if fresh:
            _agree([_signature(*item) for item in fresh], group, config, runtime)
            _broadcast([parameter for _, parameter in fresh], group, runtime)
        return compiled(*args)

    return run


def _agree(signatures: Sequence[Signature], group: ProcessGroup, config: DCTConfig, runtime: Runtime) -> None:
    """Raises ``RuntimeError`` where another rank has other parameters, or does not come."""
    try:
        runtime.agreement.check(group, config.comparable(), signatures, fresh=True)
    except RuntimeError as error:
        raise RuntimeError(f"{error} {_ADVICE}") from error


def _broadcast(parameters: Sequence[Tensor], group: ProcessGroup, runtime: Runtime) -> None:
    with torch.no_grad():
        values = [local_tensor(parameter) for parameter in parameters]
        # A process group carries real numbers only.
        values = [torch.view_as_real(value) if value.is_complex() else value for value in values]
        try:
            _broadcast_coalesced(group, values, BUCKET_BYTES, 0)
        except RuntimeError as error:
            runtime.agreement.explain(group, error)
            raise
    runtime.synchronised.update((parameter, True) for parameter in parameters)


def _signature(name: str, parameter: Tensor) -> Signature:
    """Describes a parameter as the ranks compare it: which part of which tensor, and whether it is trained."""
    local = local_tensor(parameter)
    key = f"parameter {str(local.dtype).removeprefix('torch.')} {list(local.shape)}"
    if isinstance(parameter, DTensor):
        places = zip(parameter.placements, parameter.device_mesh.get_coordinate() or (), strict=False)
        key += "".join(f", {placement} number {place}" for placement, place in places if not placement.is_replicate())
    return Signature(key, "trained" if parameter.requires_grad else "frozen", name)
