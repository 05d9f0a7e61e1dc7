"""Recognises copies from one accelerator to another inside of one process: a model that is cut over devices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

TARGETS = frozenset({torch.ops.prims.device_put.default, torch.ops.aten._to_copy.default})


def is_device_copy(node: fx.Node) -> bool:
    """Returns True if ``node`` copies a tensor from one accelerator to another, and changes nothing else about it."""
    if node.target not in TARGETS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = (item.meta.get("val") for item in (node.args[0], node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    return "cpu" not in (before.device.type, after.device.type) and before.device != after.device


def has_several_accelerators(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Returns True if the tensors of a Dynamo graph lie on several accelerators."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    values = [node.meta.get("example_value") for graph in graphs for node in graph.nodes]
    return len({value.device for value in (*values, *inputs) if isinstance(value, Tensor) and value.device.type != "cpu"}) > 1
