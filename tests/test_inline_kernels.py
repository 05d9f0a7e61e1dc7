"""Option ``inline_kernels``: the launches that take an operator's place do what it did, and Inductor's code for CUDA starts them itself."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensorMode

import dct_compile
import dct_compile.ops
from dct_compile.compiler import graph, options
from dct_compile.dry_run import dry_run
from dct_compile.passes.inline_kernels import InlineKernels, inline_kernels
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, RowLayout, Selection
from tests.ranks import fresh_compiler
from tests.small_models import all_reduce
from tests.states import assert_same
from tests.tracing import fake_group

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dct = torch.ops.dct
SEGMENTS = ((3, 300), (303, 0), (310, 5000))
NUMEL = 5320
Call = tuple[torch._ops.OpOverload, list[Any]]

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


def gradient_calls(grad: torch.dtype, value: torch.dtype, block: int, chunks: int = 1) -> Iterator[Call]:
    """Operators of one step with arguments as they occur: each has seen what the ones before it did."""
    random = torch.Generator().manual_seed(0)
    layout = GradientLayout(SEGMENTS, block, chunks, -1, 0.1, value)
    state = random_state(layout, random)
    gradient = torch.randn(NUMEL, generator=random).to(DEVICE, grad)
    for method in ("laplace", "fixed", "exact"):
        yield dct.select_threshold.default, [gradient, *state, layout, Selection(0.05, method, 0.5, 10, "geometric", True), True]
    arguments = [gradient, *state, layout, True]
    yield dct.threshold_pack.default, arguments
    payload = dct.threshold_pack(*arguments)
    dense = torch.randn(NUMEL - state[0].numel(), generator=random).to(DEVICE, grad)
    yield dct.unpack_accumulate.default, [payload.repeat(2), dense, NUMEL, grad, layout, 2]
    yield dct.unpack_into.default, [torch.empty_like(gradient), payload.repeat(2), dense, layout, 2]
    if chunks > 1:
        layout = GradientLayout(SEGMENTS, block, chunks, 1, 0.1, value)
        state = random_state(layout, random)
        received = payload.view(chunks, -1)[1].repeat(2)
        for method in ("exact", "fixed"):
            yield dct.repack.default, [received, *state, layout, Selection(0.05, method, 0.5, 10, "off", True), True]


def random_state(layout: GradientLayout, random: torch.Generator) -> list[Tensor]:
    counters = torch.zeros(3, 5, dtype=torch.int64, device=DEVICE)
    return [torch.randn(layout.state_numel, generator=random).to(DEVICE), torch.zeros(3, device=DEVICE), counters]


def row_calls(dtype: torch.dtype) -> Iterator[Call]:
    x = torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    layout = RowLayout((3, 40), 5, dtype)
    for method in ("laplace", "fixed", "exact"):
        yield dct.pack_rows.default, [x, layout, method, 0.1, 0.5]
    payload = dct.pack_rows(x, layout, "exact", 0.1, 0.5)
    yield dct.unpack_rows.default, [payload, layout, 2, dtype]
    yield dct.gather_rows.default, [x, payload, layout, dtype]
    values = dct.gather_rows(x, payload, layout, dtype)
    yield dct.scatter_rows.default, [values, payload, layout, 1, dtype]
    for bits in (4, 8):
        seed = torch.tensor([5], device=DEVICE)
        yield dct.quantize_rows.default, [x, seed, bits]
        yield dct.dequantize_rows.default, [dct.quantize_rows(x, seed, bits), [3, 40], bits, dtype]


CALLS: list[Callable[[], Iterator[Call]]] = [
    lambda: gradient_calls(torch.float32, torch.bfloat16, 256),
    lambda: gradient_calls(torch.bfloat16, torch.int8, 4096, 4),
    lambda: gradient_calls(torch.float16, torch.float32, WHOLE_PIECE, 4),
    lambda: row_calls(torch.float32),
    lambda: row_calls(torch.bfloat16),
]


def graph_of(operator: torch._ops.OpOverload, arguments: list[Any]) -> fx.GraphModule:
    """A graph of one operator, with its tensors as inputs."""
    module = fx.GraphModule(nn.Module(), fx.Graph())
    mode = FakeTensorMode()
    items = []
    for argument in arguments:
        item = argument
        if isinstance(argument, Tensor):
            item = module.graph.placeholder(f"input_{len(items)}")
            item.meta["val"] = mode.from_tensor(argument)
        items.append(item)
    node = module.graph.call_function(operator, tuple(items), {"site": "a name"})
    node.meta["from_node"] = ["a name"]
    module.graph.output(node if operator._schema.returns else None)
    return module


class Interpreted:
    """`torch.library.wrap_triton` for kernels of Triton's interpreter, which the real one does not put into a graph."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        def record(*arguments: Any, **options: Any) -> None:
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
            graphable = {name: value for name, value in given.items() if isinstance(value, Tensor | int | float)}
            others = {name: value for name, value in given.items() if name not in graphable}
            triton_kernel_wrapper_mutation(
                kernel_idx=kernel_side_table.add_kernel(self.kernel),
                constant_args_idx=kernel_side_table.add_constant_args(others),
                grid=[grid],
                tma_descriptor_metadata={},
                kwargs=graphable,
            )

        return record


@pytest.fixture
def wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches can be recorded, by the interpreter too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.library, "wrap_triton", Interpreted)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@needs_triton
@pytest.mark.usefixtures("wrapped")
@pytest.mark.parametrize("calls", CALLS, ids=["gather", "owner int8", "owner whole", "rows float32", "rows bfloat16"])
def test_the_launches_do_what_the_operator_did(calls: Callable[[], Iterator[Call]]) -> None:
    for operator, arguments in calls():
        module = graph_of(operator, arguments)
        inline_kernels(module.graph, DEVICE)
        module.graph.lint()
        module.recompile()
        targets = [node.target for node in module.graph.nodes]
        assert operator not in targets
        assert triton_kernel_wrapper_mutation in targets
        assert all(node.meta["from_node"] == ["a name"] for node in module.graph.nodes if node.op == "call_function")
        tensors = [argument.clone() for argument in arguments if isinstance(argument, Tensor)]
        versions = [tensor._version for tensor in tensors]
        result = module(*tensors)
        assert [tensor._version for tensor in tensors] == versions
        expected = operator(*arguments)
        for got, wanted in zip([result, *tensors], [expected, *(item for item in arguments if isinstance(item, Tensor))], strict=True):
            assert (got is None and wanted is None) or torch.equal(as_bytes(got), as_bytes(wanted)), operator


@needs_triton
@pytest.mark.slow
def test_inductor_generates_code_for_cuda_that_starts_the_kernels() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-m", "tests.code_for_cuda"], env=environment, capture_output=True, text=True)
    gradients = "fill hold pack rank repack unpack"
    rows = "dense_rows dequantize_rows gather_rows pack_rows quantize_rows"
    assert done.stdout.split() == sorted(f"{name}_kernel" for name in (gradients + " " + rows).split()), done.stderr


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.relu(self.first(x)))
        return output


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("value", ["bfloat16", "int8"])
@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "CUDA graphs"])
def test_training_leaves_the_same_state(graphs: bool, value: str) -> None:
    def train(inline: bool) -> dict[str, Any]:
        options = {"data_parallel": True, "dp_density": 0.05, "dp_value_dtype": value, "gradient_scheme": "gather"}
        with fake_group(2), fresh_compiler():
            model = Net().to(DEVICE)
            compiled = torch.compile(model, backend="dct", options=options | {"inline_kernels": inline, "triton.cudagraphs": graphs})
            for step in range(4):
                compiled(torch.randn(16, 64, generator=torch.Generator().manual_seed(step)).to(DEVICE)).square().mean().backward()
            return dct_compile.state_dict(model)

    assert_same(train(False), train(True))


class Marker(CustomGraphPass):
    """A user's own pass."""

    def __init__(self, identity: str | None) -> None:
        self.identity, self.calls = identity, 0

    def uuid(self) -> str | None:
        return self.identity

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1


def test_the_cache_key_covers_the_kernels_and_the_users_own_passes() -> None:
    keys = [InlineKernels(passes).uuid() for passes in ([], [Marker("one")], [Marker("two")])]
    assert None not in keys
    assert len(set(keys)) == 3
    assert InlineKernels([Marker(None)]).uuid() is None
    assert InlineKernels([lambda graph: None]).uuid() is None


@pytest.mark.parametrize("inline", [False, True])
def test_the_option_adds_a_pass_behind_the_users_own(inline: bool) -> None:
    own, seen = Marker("own"), []
    compile_graph = graph.compile_graph

    def watched(gm: fx.GraphModule, inputs: Any, patches: dict[str, Any], inner: Any) -> Any:
        seen.append(patches["post_grad_custom_post_pass"])
        return compile_graph(gm, inputs, patches, inner)

    given = {"post_grad_custom_post_pass": own, "inline_kernels": inline, "fx_graph_cache": False}
    with fake_group(1), fresh_compiler(), mock.patch.object(graph, "compile_graph", watched):
        compiled = torch.compile(lambda x: all_reduce(x.sin()) + 1, backend="dct", options=given)
        assert torch.equal(compiled(torch.ones(4)), torch.ones(4).sin() + 1)
    assert own.calls == 1
    assert [isinstance(item, InlineKernels) for item in seen] == [inline]


def test_without_triton_the_option_is_refused() -> None:
    with mock.patch.object(options, "HAS_TRITON", False), pytest.raises(ValueError, match="'inline_kernels' is True, but Triton"):
        dry_run({"inline_kernels": True}, mock.Mock())
    dry_run({"inline_kernels": False}, mock.Mock())
