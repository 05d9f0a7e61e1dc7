"""Finds the gradients that ``data_parallel`` does not average, because no backward of a compiled graph gives them to a parameter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import eager_transforms

from dct_compile.passes import graph_utils as gu
from dct_compile.passes.graph_input import GraphInput

_GRADIENT_CALLS = (torch.autograd.grad, getattr(eager_transforms, "_autograd_grad", None))
"""The functions in a Dynamo graph that compute gradients, the second one for ``torch.func``. Both take outputs, then inputs."""


def differentiated(gm: fx.GraphModule, inputs: Sequence[GraphInput]) -> list[str]:
    """Returns the names of parameters whose gradients a Dynamo graph computes itself, by ``torch.func`` or ``torch.autograd.grad``.

    Where a graph trains no parameter, each of its inputs may be one, as in a dict of detached tensors. Where it does, the gradient of
    another input is a part of its loss, such as a force or a penalty.

    Args:
        gm: The Dynamo graph.
        inputs: Its inputs.
    """
    described = dict(zip(gu.placeholders(gm.graph), inputs, strict=True))
    any_input = torch.is_grad_enabled() and not any(info.is_trainable for info in inputs)
    found: dict[str, None] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in _GRADIENT_CALLS:
            wanted = node.args[1] if len(node.args) > 1 else node.kwargs["inputs"]
            for item in [wanted] if isinstance(wanted, fx.Node) else wanted:
                info = described.get(_unwrapped(item))
                if info is not None and (info.is_parameter or any_input):
                    found[info.name] = None
    return list(found)


def plain_leaves(gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: Sequence[GraphInput]) -> list[str]:
    """Returns the names of tensors that are trained without being parameters: leaves that require gradients.

    The inputs of a model may be such leaves, too: the example of a penalty, or what another stage of a pipeline has sent. So arguments
    count only where the graph trains no parameter, and attributes of a module always.

    Args:
        gm: The Dynamo graph.
        example_inputs: Its example inputs.
        inputs: The same, described.
    """
    if not torch.is_grad_enabled():
        return []
    alone = not any(info.is_trainable for info in inputs)
    return [
        info.name
        for node, example, info in zip(gu.placeholders(gm.graph), example_inputs, inputs, strict=True)
        if isinstance(example, Tensor) and example.requires_grad and example.is_leaf and not info.is_parameter
        if alone or _source(node).startswith("L['self']")
    ]


def _unwrapped(node: fx.Node) -> fx.Node:
    """Returns the node that ``node`` is made of, through functions of one tensor: wrappers of ``torch.func``, casts, views."""
    while node.op != "placeholder" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    return str(source.name) if source is not None else ""
