"""The ways to carry gradients that ``dct train`` compares: how a model is wrapped and compiled for each, and what a rank sends."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dct_compile.cli.backends import POWERSGD_RANKS
from dct_compile.models.parallel import Mesh, wrap_data_parallel
from dct_compile.runtime import RUNTIME
from dct_compile.traffic import from_one, ring_twice

POWERSGD_START = 10
"""Steps of a training that torch's PowerSGD sends dense: buckets change in the first ones."""
_ONE_BUCKET_MB = 1 << 20
"""More than any model has. With several buckets, torch's PowerSGD can start collectives in another order on each rank."""


@dataclass(frozen=True)
class Compiled:
    """A model that is wrapped and compiled. ``restart`` forgets what its method kept from another training."""

    module: nn.Module
    restart: Callable[[], None]


def compile_with(backend: str, model: nn.Module, mesh: Mesh, options: dict[str, Any], bucket_cap_mb: int | None = None) -> Compiled:
    """Wraps ``model`` in DDP, unless the option ``data_parallel`` averages its gradients, and compiles it.

    Args:
        backend: One of BACKENDS.
        model: The plain model.
        mesh: The ranks; hooks of torch need ``mp`` 1 and two ranks or more.
        options: Those of the backend "dct".
        bucket_cap_mb: MiB of DDP's buckets for "dct"; DDP's own default is 25.
    """
    restart: Callable[[], None] = _nothing
    if backend == "dct":
        wrapped = model if options.get("data_parallel") else wrap_data_parallel(model, mesh, bucket_cap_mb)
        compiled = torch.compile(wrapped, backend="dct", options=options)
        restart = partial(RUNTIME.states.load_state_dict, model, {})
    elif backend in POWERSGD_RANKS:
        low_rank = _PowerSGD(POWERSGD_RANKS[backend])
        compiled = _with_hook(DistributedDataParallel(model, bucket_cap_mb=_ONE_BUCKET_MB), low_rank, _powersgd)
        restart = low_rank.restart
    elif backend == "fp16":
        compiled = _with_hook(DistributedDataParallel(model), None, fp16_compress_hook)
    else:
        compiled = torch.compile(wrap_data_parallel(model, mesh), backend="inductor")
    assert isinstance(compiled, nn.Module)
    return Compiled(compiled, restart)


def computed_bytes(backend: str, model: nn.Module, ranks: int) -> list[tuple[int, float]]:
    """Computes from shapes the bytes that a rank sends per step for a model that is data parallel only, mean over the ranks.

    Buffers are counted, which DDP sends from rank 0 at each step.

    Returns:
        (first step, bytes per step), one entry for each time that the number changes. Empty for "dct", which reports its bytes.
    """
    if backend == "dct":
        return []
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = from_one(_size(model.buffers()), ranks).wire
    dense = float(ring_twice(_size(parameters), ranks).wire + buffers)
    if backend == "fp16":
        halves = sum(2 * parameter.numel() for parameter in parameters)
        return [(1, float(ring_twice(halves, ranks).wire + buffers))]
    if backend in POWERSGD_RANKS:
        low_rank = sum(parameter.itemsize * _low_rank_numel(parameter, POWERSGD_RANKS[backend]) for parameter in parameters)
        return [(1, dense), (POWERSGD_START + 1, float(ring_twice(low_rank, ranks).wire + buffers))]
    return [(1, dense)]


def _with_hook(wrapped: DistributedDataParallel, state: object, hook: Callable[..., torch.futures.Future[Tensor]]) -> Any:
    wrapped.register_comm_hook(state, hook)
    return torch.compile(wrapped, backend="inductor")


class _PowerSGD:
    """The state of torch's PowerSGD. DDP takes a hook once, so what the hook reads is exchanged instead."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.restart()

    def restart(self) -> None:
        """Forgets residuals and factors."""
        self.state = PowerSGDState(None, matrix_approximation_rank=self.rank, start_powerSGD_iter=POWERSGD_START, min_compression_rate=1)


def _powersgd(low_rank: _PowerSGD, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    return powerSGD_hook(low_rank.state, bucket)


def _low_rank_numel(parameter: Tensor, rank: int) -> int:
    """Returns the elements of both factors of a gradient, or all of its elements where PowerSGD sends them as they are."""
    rows = parameter.shape[0] if parameter.ndim else 1
    columns = parameter.numel() // rows
    factors = (rows + columns) * min(rows, columns, rank)
    return min(factors, parameter.numel())


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _nothing() -> None:
    pass
