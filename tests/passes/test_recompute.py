"""Activation checkpointing: what stands for a collective is recomputed, or saved, as the collective would be."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.small_models import all_reduce, c10d, exchange, gather, leaf
from tests.tracing import Trace, dct, nodes_of, outputs, trace

QUANTIZE, A2A = dct.quantize_rows.default, c10d.all_to_all_single.default


def saves_collectives(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_collective = isinstance(operator, torch._ops.OpOverload) and operator.namespace == "_c10d_functional"
    return CheckpointPolicy.MUST_SAVE if is_collective else CheckpointPolicy.PREFER_RECOMPUTE


def twice(collective: Callable[[Tensor], Tensor], x: Tensor, selective: bool = False) -> Tensor:
    """Two layers around a collective, each in a checkpoint of its own."""
    more = {"context_fn": partial(create_selective_checkpoint_contexts, saves_collectives)} if selective else {}
    for _ in range(2):
        x = checkpoint(lambda y: torch.tanh(collective(torch.sin(y))[: y.shape[0]] * y), x, use_reentrant=False, **more)
    return x


def saved_bytes(found: Trace) -> int:
    """The bytes that the forward keeps for the backward, inputs left out: what it returns behind its one result."""
    values = [node.meta["val"] for node in outputs(found.forward)[1:] if node.op != "placeholder"]
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("collective", [exchange, gather, all_reduce], ids=lambda function: function.__name__)
@pytest.mark.parametrize("codec", ["int8", "int4", "threshold"])
def test_no_more_is_saved_than_dense(collective: Callable[[Tensor], Tensor], codec: str) -> None:
    options: dict[str, Any] = {"activation_codec": codec, "mp_density": 0.125}
    dense = trace(lambda x: twice(collective, x), leaf(16, 64), activation_codec="dense")
    found = trace(lambda x: twice(collective, x), leaf(16, 64), **options)
    assert all(decision.compressed for decision in found.decisions)
    assert saved_bytes(found) == saved_bytes(dense) > 0


def test_the_backward_exchanges_again() -> None:
    """As dense collectives do in a checkpoint: the backward sends the forward's codes once more, and then those of the gradients."""
    found = trace(lambda x: twice(exchange, x), leaf(16, 64), activation_codec="int8")
    assert len(nodes_of(found.forward, A2A)) == len(nodes_of(found.forward, QUANTIZE)) == 2
    assert len(nodes_of(found.backward, A2A)) == len(nodes_of(found.backward, QUANTIZE)) == 4


def test_a_policy_that_saves_collectives_holds() -> None:
    found = trace(lambda x: twice(exchange, x, selective=True), leaf(16, 64), activation_codec="int8")
    assert len(nodes_of(found.backward, A2A)) == len(nodes_of(found.backward, QUANTIZE)) == 2
