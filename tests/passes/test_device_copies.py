"""Copies between accelerators of one process: on graphs of fake tensors, because no device is there.

Forward and backward are written out: autograd does not take a device that torch was not built for.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dct_compile.compiler.first_use import FirstUse
from dct_compile.config import DCTConfig
from dct_compile.exchange import ACTIVATION, BACKWARD_OF, OTHER, RETURNED, Parameter
from dct_compile.link import Link
from dct_compile.passes.decision import Decision
from dct_compile.passes.device_copy import has_several_accelerators
from dct_compile.passes.manager import link_between
from dct_compile.passes.plan import plan
from dct_compile.passes.record import describe
from dct_compile.passes.rewrite import rewrite
from dct_compile.passes.sites import GraphContext, find_sites
from dct_compile.reasons import Reason
from dct_compile.runtime import Runtime
from tests.row_mask import masked
from tests.tracing import nodes_of

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
ROWS, WIDTH = 16, 64
DENSITY = 0.25
put, dct = torch.ops.prims.device_put.default, torch.ops.dct


def layers(x: Tensor, first: Tensor, second: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
    """Two layers on two devices: the result, and the gradients of both weights."""
    h = torch.relu(x @ first)
    moved = h.to(SECOND)
    dh = (tangents @ second.t()).to(FIRST) * (h > 0)
    return moved @ second, x.t() @ dh, moved.t() @ tangents


def returned(x: Tensor, first: Tensor, second: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
    """A result that is handed over on the other device, and a weight that moves there."""
    return (x @ first).to(SECOND), torch.relu(tangents @ first.to(SECOND))


def same(x: Tensor, first: Tensor, second: Tensor, tangents: Tensor) -> tuple[Tensor, ...]:
    """Copies that cross no link between accelerators."""
    return x.to("cpu").to(FIRST).to(torch.bfloat16) @ first.to(FIRST).to(torch.bfloat16), tangents @ second


def joint(function: Callable[..., Any]) -> tuple[fx.GraphModule, GraphContext]:
    """The graph of ``function``, with the numbers that autograd would give to a copy and to that of its gradient."""
    with FakeTensorMode():
        inputs = [
            torch.empty(ROWS, WIDTH, device=FIRST),
            *(torch.empty(WIDTH, WIDTH, device=device) for device in (FIRST, SECOND)),
            torch.empty(ROWS, WIDTH, device=SECOND),
        ]
        with torch.no_grad():
            module = make_fx(function, select_decomp_table())(*inputs)
    holders = list(module.graph.find_nodes(op="placeholder"))
    parameters = {node: Parameter(place, name, (WIDTH, WIDTH)) for place, (name, node) in enumerate(zip("ab", holders[1:3], strict=True))}
    for node in nodes_of(module.graph, put):
        node.meta["seq_nr"] = 7
    results = {0: RETURNED}
    return module, GraphContext(training=True, parameters=parameters, tangents=holders[3:], results=results)


def decided(module: fx.GraphModule, context: GraphContext, **options: Any) -> list[Decision]:
    config, runtime = DCTConfig(**options), Runtime()
    return plan(find_sites(module.graph, context), config, True, lambda name: link_between(runtime, config, name))


def rewritten(**options: Any) -> tuple[fx.GraphModule, list[Decision]]:
    module, context = joint(layers)
    decisions = decided(module, context, link=None, mp_density=DENSITY, mp_value_dtype="float32", **options)
    describe(module.graph, decisions)
    assert rewrite(module.graph, decisions, lambda _: {}) == 2
    module.recompile()
    return module, decisions


def test_a_copy_and_that_of_its_gradient_are_twins() -> None:
    first, second = find_sites(*joint_graph(layers))
    assert (first.kind, second.kind) == (ACTIVATION, BACKWARD_OF[ACTIVATION])
    assert second.twin is first
    assert (first.collective.name, first.group_name, first.group_size) == ("device_copy", "", 2)


def joint_graph(function: Callable[..., Any]) -> tuple[fx.Graph, GraphContext]:
    module, context = joint(function)
    return module.graph, context


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("auto", Reason.FAST_COPY),
        ("16Gbit/s", None),
        (None, None),
        (Link(1e13, 1e-7), "row_threshold would take"),
    ],
)
def test_a_copy_is_encoded_where_a_link_is_assumed_that_is_slow(link: Any, reason: str | None) -> None:
    forward, backward = decided(*joint(layers), link=link, mp_density=DENSITY)
    assert forward.compressed == backward.compressed == (reason is None)
    assert forward.dense_bytes == backward.dense_bytes == ROWS * WIDTH * 4
    if reason is not None:
        assert forward.reason.startswith(reason)
        assert backward.reason == Reason.DENSE_FORWARD.format(reason=forward.reason)


def test_results_and_parameters_stay_dense() -> None:
    decisions = decided(*joint(returned), link=None)
    assert [(item.exchange.kind, item.reason) for item in decisions] == [
        (ACTIVATION, Reason.RETURNED),
        (OTHER, Reason.PARAMETERS),
    ]


def test_copies_to_the_host_or_within_a_device_are_no_sites() -> None:
    assert find_sites(*joint_graph(same)) == []


def test_payloads_cross_the_link_and_are_decoded_behind_it() -> None:
    module, decisions = rewritten()
    crossing = nodes_of(module.graph, put)
    assert [(node.args[0].meta["val"].device, node.meta["val"].device) for node in crossing] == [(FIRST, SECOND), (SECOND, FIRST)]
    sent = [node.meta["val"].numel() * node.meta["val"].itemsize for node in crossing]
    assert sent == [decision.wire_bytes for decision in decisions]
    devices = {}
    for node in module.graph.nodes:
        if getattr(node.target, "namespace", "") == "dct":
            devices[node.target._schema.name] = (node.args[0].meta["val"].device, node.meta["val"].device)
    assert devices == {
        "dct::pack_rows": (FIRST, FIRST),
        "dct::unpack_rows": (SECOND, SECOND),
        "dct::gather_rows": (SECOND, SECOND),
        "dct::scatter_rows": (FIRST, FIRST),
    }


def test_no_other_rank_is_asked_about_copies() -> None:
    """The graph is watched all the same, for the report."""
    first_use = FirstUse(DCTConfig(), Runtime())
    first_use.expect(decided(*joint(layers), link=None), True)
    assert first_use.forward.signatures == first_use.backward.signatures == {}
    assert first_use.before_forward(len, []) is not len


class OnHost(fx.Interpreter):
    """Runs a graph of two devices on the CPU, where a copy from one to the other changes nothing."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0] if target is put else super().call_function(target, args, kwargs)


def test_values_are_those_of_the_mask() -> None:
    module, _ = rewritten()
    x, first, second, tangent = (torch.randn(size, WIDTH) for size in (ROWS, WIDTH, WIDTH, ROWS))
    result, grad_first, grad_second = OnHost(module).run(x, first, second, tangent)
    h = torch.relu(x @ first)
    mask = masked(h, DENSITY) != 0
    dh = (tangent @ second.t()) * mask * (h > 0)
    torch.testing.assert_close(result, (h * mask) @ second)
    torch.testing.assert_close(grad_first, x.t() @ dh)
    torch.testing.assert_close(grad_second, (h * mask).t() @ tangent)


def test_graphs_of_several_accelerators_are_told_before_a_trace() -> None:
    with FakeTensorMode():
        there = [torch.empty(2, device=device) for device in (FIRST, SECOND, torch.device("cpu"))]
    module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    assert not has_several_accelerators(module, [there[0], there[2], 3])
    assert has_several_accelerators(module, there)
    node = module.graph.placeholder("x")
    node.meta["example_value"] = there[1]
    assert has_several_accelerators(module, [there[0]])
