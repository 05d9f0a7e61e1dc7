"""Prepares the states of a compiled graph's gradient sites before the part of it that exchanges them runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dct_compile.config import DCTConfig
from dct_compile.exchange import Exchange
from dct_compile.passes.decision import Decision
from dct_compile.passes.graph_utils import resolve_group
from dct_compile.passes.manager import StateRequest
from dct_compile.runtime import Runtime
from dct_compile.state.bucket import BucketState
from dct_compile.state.exchanges import count_exchange

Compiled = Callable[..., Any]


def before_exchanges(compiled: Compiled, requests: Sequence[StateRequest], config: DCTConfig, runtime: Runtime) -> Compiled:
    """Returns ``compiled``, a partitioned backward, which prepares the states among its arguments for an exchange.

    Which states these are is only known by then: the backward of one layer may follow the forward of another that shares the graph.
    """

    def run(args: list[Any]) -> Any:
        known = {_address(bucket): bucket for request in requests for bucket in request.buckets}
        given = {item.data_ptr() for item in args if isinstance(item, Tensor)}
        buckets = [bucket for address, bucket in known.items() if address in given]
        if any(bucket.is_given_up for bucket in buckets):
            raise RuntimeError(
                "a backward runs after a forward of the next phase, which has taken over its residuals (options 'start_iter',"
                " 'density_warmup'): run the backwards of all earlier forwards before the first exchange of a phase"
            )
        begin_exchanges(buckets, config, runtime)
        return compiled(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def with_count(compiled: Compiled, decisions: Sequence[Decision], options: DCTConfig, runtime: Runtime) -> Compiled:
    """Returns ``compiled``, a partitioned backward, which counts an exchange of the gradients of its parameters, if it averages any.

    The parameters are those that autograd's node of the graph leads to. A graph that sends all gradients dense is given no state of theirs.

    Args:
        compiled: The backward.
        decisions: The decisions about the graph.
        options: The options, with all phases.
        runtime: Compares the numbers of exchanges, and keeps them.

    Raises:
        RuntimeError: When it is called: autograd has no such node.
    """
    averaging = [decision.exchange for decision in decisions if decision.exchange.segments]
    if not averaging:
        return compiled

    def run(args: list[Any]) -> Any:
        node = torch._C._current_autograd_node()
        following: list[Any] = [function for function, _ in node.next_functions] if node is not None else []
        parameters: list[Tensor] = [function.variable for function in following if hasattr(function, "variable")]
        if not parameters:
            raise RuntimeError(
                "autograd does not tell whose gradients a backward averages, so options 'start_iter' and 'density_warmup' cannot follow its"
                " exchanges; set both to 0"
            )
        begin_count(parameters, averaging, options, runtime)
        return compiled(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def begin_count(parameters: Sequence[Tensor], averaging: Sequence[Exchange], options: DCTConfig, runtime: Runtime) -> None:
    """Counts an exchange of the gradients of ``parameters``, whose numbers so far are equal on all ranks from then on.

    Raises:
        RuntimeError: They are not.
    """
    named = [(averaging[0].label, parameter) for parameter in parameters]
    for group in dict.fromkeys(exchange.group for exchange in averaging):
        runtime.agree_on_exchanges(resolve_group(group), options, named)
    count_exchange(runtime.states.use.of(parameters))


def begin_exchanges(buckets: Sequence[BucketState], config: DCTConfig, runtime: Runtime) -> None:
    """Prepares the states of ``buckets`` for an exchange, before any gradient of the present backward is there."""
    runtime.states.use.look([found for bucket in buckets for ref in bucket.parameters if (found := ref()) is not None])
    for bucket in buckets:
        runtime.begin_exchange(bucket, config)


def _address(bucket: BucketState) -> int:
    return bucket.tensors["residual"].data_ptr()
