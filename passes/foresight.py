"""Tells before any tracing whether a Dynamo graph can hold a site: one that cannot is compiled exactly as by Inductor, caches included."""

from collections.abc import Sequence
from types import BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dct_compile.passes.device_copy import has_several_accelerators

_PLAIN_NAMESPACES = ("aten", "prims", "prim")
_PLAIN_MODULES = ("torch", "_operator", "math", "builtins")
"""The packages whose functions compute on one rank, but for torch.distributed."""
_HOLDERS = (
    "autograd_function_apply",
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_autocast",
    "wrap_with_set_grad_enabled",
    "invoke_subgraph",
    "cond",
    "while_loop",
    "scan",
    "associative_scan",
    "map_impl",
    "flex_attention",
)
"""Higher-order operators that run nothing but their subgraphs, which are modules of the graph and looked at as well."""
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")


def can_hold_sites(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Returns False only where neither a collective nor a copy between devices can appear in the joint graph of ``gm``.

    A collective can come from an operator or a function that is not known to compute on one rank, from a tensor subclass such as DTensor,
    and from a hook.
    """
    if any(isinstance(item, Tensor) and is_traceable_wrapper_subclass(item) for item in inputs) or has_several_accelerators(gm, inputs):
        return True
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(_can_communicate(node) for graph in graphs for node in graph.nodes)


def _can_communicate(node: fx.Node) -> bool:
    target: Any = node.target
    if node.op == "call_method":
        return target in _HOOKS
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() not in _HOLDERS
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        return name.partition("::")[0] not in _PLAIN_NAMESPACES
    module = getattr(target, "__module__", None)
    if module is None:
        return not isinstance(target, BuiltinFunctionType | MethodDescriptorType | WrapperDescriptorType)
    return module.partition(".")[0] not in _PLAIN_MODULES or module.startswith("torch.distributed")
