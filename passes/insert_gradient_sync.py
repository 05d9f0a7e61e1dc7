"""Adds the averaging of gradients to a joint graph, for models that no DDP wraps (``data_parallel=True``).

    return y, dw, db            flat   = cat(dw.reshape(-1), db.reshape(-1))          one buffer per bucket
                         ==>    mean   = wait_tensor(all_reduce(flat, "avg", group))
                                return y, mean[:n].reshape(...), mean[n:].reshape(...)

Each all_reduce starts as soon as its bucket's last gradient exists; all of them are waited for at the end of the graph, so that
communication runs beside the rest of the backward. Gradients that the graph does not return are left alone.
"""

from collections.abc import Sequence

import torch
from torch import fx

from dct_compile.passes import graph_utils as gu
from dct_compile.passes.sites import GraphContext, Parameter, Segment

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

BUCKET_BYTES = 25 * 2**20
"""As DDP's default bucket: large enough for the link's bandwidth, small enough to start early."""


def gradient_buckets(parameters: Sequence[tuple[Parameter, torch.dtype]]) -> list[tuple[Parameter, ...]]:
    """Groups parameters of one dtype, last used first (their gradients come first), into buckets of about ``BUCKET_BYTES``."""
    buckets: list[tuple[Parameter, ...]] = []
    for dtype in dict.fromkeys(dtype for _, dtype in parameters):
        current: list[Parameter] = []
        for parameter in (parameter for parameter, own in reversed(parameters) if own is dtype):
            if current and (sum(held.numel for held in current) + parameter.numel) * dtype.itemsize > BUCKET_BYTES:
                buckets.append(tuple(current))
                current = []
            current.append(parameter)
        buckets.append(tuple(current))
    return buckets


def insert_gradient_sync(graph: fx.Graph, context: GraphContext, buckets: Sequence[Sequence[Parameter]], group_name: str) -> int:
    """Inserts one averaging all_reduce per bucket and declares its layout in ``context.segments``; returns their number."""
    output = gu.output_node(graph)
    outputs = list(output.args[0])  # type: ignore[arg-type]
    positions = {parameter: position for position, parameter in context.gradients.items() if isinstance(outputs[position], fx.Node)}
    order = {node: position for position, node in enumerate(graph.nodes)}
    inserted = 0
    for bucket in buckets:
        members = [parameter for parameter in bucket if parameter in positions]
        if not members:
            continue
        gradients = [outputs[positions[parameter]] for parameter in members]
        last = max(gradients, key=order.__getitem__)
        start = gu.Inserter(graph, last.next, last, in_backward=True)
        finish = gu.Inserter(graph, output, last, in_backward=True)
        flats = [start.call(aten.reshape.default, gradient, [-1]) for gradient in gradients]
        flat = start.call(aten.cat.default, flats)
        started = start.call(c10d.all_reduce.default, flat, "avg", group_name)
        mean = finish.call(gu.WAIT, started)
        offset = 0
        segments = []
        for parameter, gradient in zip(members, gradients, strict=True):
            part = finish.call(aten.slice.Tensor, mean, 0, offset, offset + parameter.numel)
            outputs[positions[parameter]] = finish.call(aten.reshape.default, part, list(gradient.meta["val"].shape))
            segments.append(Segment(parameter, offset))
            offset += parameter.numel
        context.segments[started] = tuple(segments)
        inserted += 1
    output.args = (outputs,)
    return inserted
