"""Adds the averaging of gradients to a joint graph, for models that no DDP wraps (``data_parallel=True``).

    return y, dw, db            flat   = cat(dw.reshape(-1), db.reshape(-1))          one buffer per bucket
                         ==>    mean   = wait_tensor(all_reduce(flat, "avg", group))
                                return y, mean[:n].reshape(...), mean[n:].reshape(...)

Each all_reduce starts as soon as its bucket's last gradient exists; all of them are waited for at the end of the graph, so that
communication runs beside the rest of the backward. Gradients that the graph does not return are left alone. So are those of parameters
that are not copies on all ranks (:class:`dct_compile.passes.graph_input.Spread`).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx
from torch.distributed import ProcessGroup

from dct_compile.buckets import BUCKET_BYTES
from dct_compile.comm import Comm
from dct_compile.exchange import Parameter, segments_of
from dct_compile.passes import graph_utils as gu
from dct_compile.passes.graph_input import GraphInput
from dct_compile.passes.sites import GraphContext
from dct_compile.passes.splice import splice


def averaged_buckets(
    inputs: Sequence[GraphInput], parameters: Iterable[Parameter], bucket_bytes: int = BUCKET_BYTES
) -> list[tuple[Parameter, ...]]:
    """Returns the buckets in which the gradients of a graph's parameters are averaged, each of one dtype and device.

    Args:
        inputs: The inputs of the Dynamo graph.
        parameters: Some of them. Those that get no gradient, or are no copies, are left out.
        bucket_bytes: Bytes that a bucket of several parameters has at most, the same on all ranks.
    """
    chosen = [(parameter, inputs[parameter.position]) for parameter in parameters]
    chosen = [(parameter, info) for parameter, info in chosen if info.is_averaged]
    buckets: list[tuple[Parameter, ...]] = []
    for device in dict.fromkeys(info.device for _, info in chosen):
        dtypes = [(parameter, info.dtype) for parameter, info in chosen if info.device == device]
        buckets += gradient_buckets([(parameter, dtype) for parameter, dtype in dtypes if dtype is not None], bucket_bytes)
    return buckets


def gradient_buckets(parameters: Sequence[tuple[Parameter, torch.dtype]], bucket_bytes: int = BUCKET_BYTES) -> list[tuple[Parameter, ...]]:
    """Groups parameters of one dtype, last used first (their gradients come first), into buckets of at most ``bucket_bytes``.

    A larger parameter has a bucket of its own.
    """
    buckets: list[tuple[Parameter, ...]] = []
    for dtype in dict.fromkeys(dtype for _, dtype in parameters):
        current: list[Parameter] = []
        for parameter in (parameter for parameter, own in reversed(parameters) if own is dtype):
            if current and (sum(held.numel for held in current) + parameter.numel) * dtype.itemsize > bucket_bytes:
                buckets.append(tuple(current))
                current = []
            current.append(parameter)
        buckets.append(tuple(current))
    return buckets


def insert_gradient_sync(graph: fx.Graph, context: GraphContext, buckets: Sequence[Sequence[Parameter]], group: ProcessGroup) -> int:
    """Inserts one averaging all_reduce per bucket and declares its layout in ``context.segments``; returns their number.

    Raises:
        ValueError: A gradient cannot be averaged: it is sparse, or has another shape than its parameter.
    """
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
        for parameter, gradient in zip(members, gradients, strict=True):
            _check(parameter, gradient)
        last = max(gradients, key=order.__getitem__)
        meta = {**gu.inherited(last, ""), "partitioner_tag": "is_backward"}
        started, *means = splice(lambda *grads: _average(grads, comm), gradients, last.next, output, meta)
        for parameter, mean in zip(members, means, strict=True):
            outputs[positions[parameter]] = mean
        context.segments[started] = segments_of(members)
        inserted += 1
    output.args = (outputs,)
    return inserted


def _check(parameter: Parameter, node: fx.Node) -> None:
    """Raises ``ValueError`` where the gradient of ``parameter`` does not fit into a buffer."""
    gradient = gu.value(node)
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"parameter {parameter.name!r} has a sparse gradient, which data_parallel does not average: make it dense, as by"
            " nn.Embedding(sparse=False), or wrap the model in DistributedDataParallel, which averages sparse gradients as they are"
        )
    shape = tuple(gu.hint(size) for size in gradient.shape)
    if shape != parameter.shape:
        raise ValueError(
            f"parameter {parameter.name!r} has the shape {parameter.shape} on this rank and its gradient {shape}: data_parallel cannot"
            " average it. Redistribute the parameter in the model (DTensor.redistribute), so that its gradient is placed as it is"
        )


def _average(gradients: Sequence[Tensor], comm: Comm) -> list[Tensor]:
    """Returns the all_reduce that was started, then the mean of each gradient."""
    started = comm.all_reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), "avg")
    means = comm.wait(started).split([gradient.numel() for gradient in gradients])
    return [started, *(mean.view(gradient.shape) for mean, gradient in zip(means, gradients, strict=True))]
