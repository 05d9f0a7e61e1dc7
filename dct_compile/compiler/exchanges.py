"""Prepares the states of a compiled graph's gradient sites before the part of it that exchanges them runs."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dct_compile.config import DCTConfig
from dct_compile.passes.manager import StateRequest
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import BucketState

Compiled = Callable[..., Any]


def before_exchanges(compiled: Compiled, requests: Sequence[StateRequest], config: DCTConfig, runtime: Runtime) -> Compiled:
    """Returns ``compiled``, a partitioned backward, which prepares the states among its arguments for an exchange.

    Which states these are is only known by then: the backward of one layer may follow the forward of another that shares the graph.
    """

    def run(args: list[Any]) -> Any:
        known = {_address(bucket): bucket for request in requests for bucket in request.buckets}
        given = {item.data_ptr() for item in args if isinstance(item, Tensor)}
        begin_exchanges([bucket for address, bucket in known.items() if address in given], config, runtime)
        return compiled(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def begin_exchanges(buckets: Sequence[BucketState], config: DCTConfig, runtime: Runtime) -> None:
    """Prepares the states of ``buckets`` for an exchange, before any gradient of the present backward is there."""
    runtime.states.use.look([found for bucket in buckets for ref in bucket.parameters if (found := ref()) is not None])
    for bucket in buckets:
        runtime.begin_exchange(bucket, config)


def _address(bucket: BucketState) -> int:
    return bucket.tensors["residual"].data_ptr()
