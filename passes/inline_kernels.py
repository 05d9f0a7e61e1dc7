"""Replaces the operators ``torch.ops.dct`` on CUDA tensors by their kernel launches, which Inductor then sees (option ``inline_kernels``).

    payload = dct.threshold_pack(grad, residual!, threshold, counters!, ...)

becomes what tracing the operator's CUDA implementation gives::

    payload, staged, ... = zeros(...), empty(...), ...
    triton_kernel_wrapper_mutation(pack_kernel, grad, residual!, threshold, counters!, payload!, staged!, ...)

This is the last pass in front of Inductor's lowering: those before it expect a graph in which little is written in place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.ir import ExternKernel, TensorBox
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dct_compile import triton_kernels
from dct_compile.ops.library import CUDA_IMPLEMENTATIONS
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.splice import copy_nodes
from dct_compile.triton_kernels.compat import recorded_launches

_SOURCES = (__file__, *map(str, sorted(Path(triton_kernels.__path__[0]).glob("*.py"))))
_KEPT_META = ("stack_trace", "from_node", gu.SITE)


class InlineKernels(CustomGraphPass):
    """`inline_kernels` as Inductor's hook, behind a user's own passes."""

    def __init__(self, earlier: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.earlier = earlier

    def uuid(self) -> Any:
        """Covers the kernels, which Inductor's cache does not see otherwise. None, for no caching, where a user's pass has none."""
        ids = [user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None for user_pass in self.earlier]
        return None if None in ids else (get_hash_for_files(_SOURCES), *ids)

    def __call__(self, graph: fx.Graph) -> None:
        for user_pass in self.earlier:
            user_pass(graph)
        _realize_inputs(_operators(graph, "cuda"))
        inline_kernels(graph)


def inline_kernels(graph: fx.Graph, device_type: str = "cuda") -> None:
    """Replaces every operator that works on tensors of ``device_type``."""
    for node in _operators(graph, device_type):
        traced = _trace(node, CUDA_IMPLEMENTATIONS[node.target])
        meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        copies = copy_nodes(traced, node.all_input_nodes, lambda inner, late, node=node: node, meta)  # type: ignore[misc]
        result = gu.output_node(traced.graph).args[0]
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(copies[result])
        graph.erase_node(node)


def _operators(graph: fx.Graph, device_type: str) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in CUDA_IMPLEMENTATIONS and node.args[0].meta["val"].device.type == device_type]


def _realize_inputs(nodes: Sequence[fx.Node]) -> None:
    """What Inductor would take for a formula, such as a gradient that is scaled, is written to memory once and not for each launch."""
    realized: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for item in node.all_input_nodes:
            if item.op == "placeholder" or gu.value(item) is None:
                continue
            if item not in realized:
                with node.graph.inserting_before(node):
                    realized[item] = node.graph.call_function(_realize, (item,))
                realized[item].meta = dict(item.meta)
            node.replace_input_with(item, realized[item])


def _realize(x: TensorBox) -> TensorBox:
    realized = ExternKernel.realize_input(x)
    return realized if isinstance(realized, TensorBox) else TensorBox(realized)


_realize._inductor_lowering_function = True  # type: ignore[attr-defined]  # called when the graph is lowered
# From torch 2.14 on Inductor asks what such a node returns, where an input of it changes: what its argument 0 is.
_realize._inductor_lowering_output_metadata_is_input = 0  # type: ignore[attr-defined]


def _trace(node: fx.Node, implementation: Callable[..., Any]) -> fx.GraphModule:
    """What ``implementation`` does with the arguments of ``node``, as a graph over the nodes among them."""
    inputs = node.all_input_nodes

    def run(*values: Any) -> Any:
        return implementation(*fx.map_arg(node.args, dict(zip(inputs, values, strict=True)).__getitem__))

    values = [item.meta["val"] for item in inputs]
    mode = detect_fake_mode(values)
    assert mode is not None
    decompositions = {**select_decomp_table(), gu.aten.zeros.default: _zeros}
    del decompositions[gu.aten.fill_.Scalar]
    with _real_inputs(mode), mode, recorded_launches():
        return make_fx(run, decompositions)(*values)


@contextmanager
def _real_inputs(mode: FakeTensorMode) -> Iterator[None]:
    """While it lasts, ``mode`` takes real tensors as well: the tables of the kernels are real."""
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


def _zeros(size: Sequence[int], **options: Any) -> Tensor:
    """Memory that exists from here on. Inductor takes a plain ``zeros`` for a formula, and each launch that reads it would get a copy."""
    return torch.empty(size, **options).fill_(0)
