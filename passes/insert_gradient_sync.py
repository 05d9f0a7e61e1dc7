"""Adds the averaging of gradients to a joint graph, for models that no DDP wraps (``data_parallel=True``).

    return y, dw, db            flat   = cat(dw.reshape(-1), db.reshape(-1))          one buffer per bucket
                         ==>    mean   = wait_tensor(all_reduce(flat, "avg", group))
                                return y, mean[:n].reshape(...), mean[n:].reshape(...)

Each all_reduce starts as soon as its bucket's last gradient exists; all of them are waited for at the end of the graph, so that
communication runs beside the rest of the backward. Gradients that the graph does not return are left alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.distributed import ProcessGroup

from dct_compile.comm import Comm
from dct_compile.exchange import Parameter, segments_of
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.sites import GraphContext
from dct_compile.passes.splice import splice

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


def insert_gradient_sync(graph: fx.Graph, context: GraphContext, buckets: Sequence[Sequence[Parameter]], group: ProcessGroup) -> int:
    """Inserts one averaging all_reduce per bucket and declares its layout in ``context.segments``; returns their number."""
    output = gu.output_node(graph)
    outputs = gu.outputs(graph)
    positions = {parameter: position for position, parameter in context.gradients.items() if isinstance(outputs[position], fx.Node)}
    order = {node: position for position, node in enumerate(graph.nodes)}
    comm = Comm(group.group_name, group.size())
    inserted = 0
    for bucket in buckets:
        members = [parameter for parameter in bucket if parameter in positions]
        if not members:
            continue
        gradients = [outputs[positions[parameter]] for parameter in members]
        last = max(gradients, key=order.__getitem__)
        meta = {**gu.inherited(last, ""), "partitioner_tag": "is_backward"}
        started, *means = splice(lambda *grads: _average(grads, comm), gradients, last.next, output, meta)
        for parameter, mean in zip(members, means, strict=True):
            outputs[positions[parameter]] = mean
        context.segments[started] = segments_of(members)
        inserted += 1
    output.args = (outputs,)
    return inserted


def _average(gradients: Sequence[Tensor], comm: Comm) -> list[Tensor]:
    """Returns the all_reduce that was started, then the mean of each gradient."""
    started = comm.all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), "avg")
    means = comm.wait(started).split([gradient.numel() for gradient in gradients])
    return [started, *(mean.view(gradient.shape) for mean, gradient in zip(means, gradients, strict=True))]
