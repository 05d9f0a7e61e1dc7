"""Describes the inputs of a Dynamo graph: names as the model's, shapes, and which ranks hold them."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from dct_compile.compiler.spread import Meshes, fsdp_meshes, spread_of
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.graph_input import PLAIN, GraphInput

_STEP = re.compile(r"""(?:^[LG])?(?:\.(\w+)|\['((?:[^'\\]|\\.)*)'\]|\["((?:[^"\\]|\\.)*)"\]|\[(\d+)\])""")
"""One step of a source: an attribute, a key or an index; the first is a local or global variable."""
_CLOSURE = re.compile(r"\.__closure__\[\d+\]\.cell_contents")
_CONTAINERS = ("_modules", "_parameters", "_buffers", "__dict__", "__self__")


def parameter_positions(inputs: Sequence[Any]) -> list[int]:
    """Returns the positions of the parameters among the inputs of a Dynamo graph."""
    return [position for position, item in enumerate(inputs) if isinstance(item, torch.nn.Parameter)]


def describe_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], group: ProcessGroup | None) -> list[GraphInput]:
    """Returns what the passes know of each input. ``group``: the ranks that average gradients, for ``data_parallel``."""
    meshes = fsdp_meshes()
    return [_describe(node, item, group, meshes) for node, item in zip(gu.placeholders(gm.graph), example_inputs, strict=True)]


def _describe(node: fx.Node, example: Any, group: ProcessGroup | None, meshes: Meshes) -> GraphInput:
    source = getattr(node, "_dynamo_source", None)
    name = readable_source(source.name) if source is not None else node.name
    if not isinstance(example, Tensor):
        return GraphInput(name, None, (), False, False, False)
    is_parameter = isinstance(example, torch.nn.Parameter)
    is_foreign = not is_parameter and (source is None or example.grad_fn is not None or "___stack" in name)
    is_trainable = is_parameter and example.requires_grad and torch.is_grad_enabled()
    local = example._local_tensor if isinstance(example, DTensor) else example
    shape = tuple(gu.hint(size) for size in local.shape)
    spread = spread_of(name, node, example, group, meshes) if is_parameter else PLAIN
    return GraphInput(name, example.dtype, shape, is_parameter, is_trainable, is_foreign, example.device, spread)


def readable_source(source: str) -> str:
    """Returns a source such as ``L['self']._modules['top']._parameters['weight']`` as a name: ``top.weight``.

    The variable that holds a module is left out, that of a list or dict is not. A source of another form is returned as it is.
    """
    steps = list(_STEP.finditer(_CLOSURE.sub("", source)))
    if len(steps) < 2 or "".join(step[0] for step in steps) != _CLOSURE.sub("", source):
        return source
    parts = [next(part for part in step.groups() if part is not None) for step in steps]
    path = parts[0 if steps[1][0].startswith("[") else 1 :]
    return ".".join(part for part in path if part not in _CONTAINERS)
