"""What Inductor generates for CUDA with ``inline_kernels``. A program, because Triton's interpreter must be off; needs no device.

Prints the names of the kernels that the generated code launches, after compiling them for sm_90.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import triton
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.compiler import ASTSource

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.passes.inline_kernels import InlineKernels
from dct_compile.triton_kernels.layout import GradientLayout, RowLayout, Selection
from tests.fake_cuda import TARGET, fake_device, fake_tables
from tests.tracing import fake_group

dct = torch.ops.dct
NUMEL, CHUNKS = 5320, 2
LOCAL, OWNED = (GradientLayout(((3, 300), (303, 0), (310, 5000)), 256, CHUNKS, chunk, 0.1, torch.int8) for chunk in (-1, 1))
SELECTION = Selection(0.05, "exact", 0.0, 10, "geometric", True)
MODE = FakeTensorMode()


def step(grad: Tensor, rows: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """The operators of a backward, on a gradient that could be computed anew by whatever reads it."""
    grad = (grad * 2).reshape(-1)
    dct.select_threshold(grad, *state[:3], LOCAL, SELECTION, True)
    payload = dct.threshold_pack(grad, *state[:3], LOCAL, True)
    chunk = dct.repack(payload.view(CHUNKS, -1).select(0, 1).repeat(2), *state[3:], OWNED, SELECTION, True)
    mean = dct.unpack_accumulate(payload.repeat(2), None, NUMEL, torch.bfloat16, LOCAL, 2)
    layout = RowLayout(tuple(rows.shape[1:]), 5, torch.float32)
    mask = dct.pack_rows(rows, layout, "laplace", 0.1, 0.0)
    values = dct.gather_rows(rows, mask, layout, torch.float32)
    return chunk, mean, dct.scatter_rows(values, mask, layout, 1, torch.float32)


def exchange(x: Tensor, indices: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """An activation and an embedding on their way to other ranks."""
    rows = x.relu(), torch.embedding(table, indices)
    first, second = (funcol.all_to_all_single(part, None, None, dist.group.WORLD) for part in rows)
    return first + 1, second + 1


class GeneratedError(Exception):
    """Thrown where Inductor would load what it has generated."""


def generate(compile_graph: Callable[[], Any]) -> tuple[GraphLowering, str]:
    """What Inductor makes of the graph that ``compile_graph`` gives it."""
    found: list[tuple[GraphLowering, str]] = []

    def stop(lowering: GraphLowering) -> None:
        found.append((lowering, lowering.codegen()[0].value))
        raise GeneratedError

    # Inductor's patterns are traced on the device; none of them is needed here.
    replaced = mock.patch.object(GraphLowering, "compile_to_module", stop), mock.patch.object(joint_graph, "lazy_init")
    with fake_tables(MODE), fake_device(), replaced[0], replaced[1]:
        try:
            compile_graph()
        except Exception:
            if not found:
                raise
    return found[0]


def calls(code: str) -> str:
    """The part that runs in every step."""
    return code[code.index("def call(") : code.index("runner = ")]


def compiled(code: str) -> Iterator[str]:
    """Compiles the kernels that stand in ``code``, as Inductor would, and yields their names."""
    with fake_device():
        for name, text in re.findall(r"async_compile\.triton\('([a-z_]+_kernel)', '''(.*?)''', device_str", code, re.DOTALL):
            kernel = getattr(PyCodeCache.load(text), name)
            meta = kernel._create_compile_meta(kernel.configs[0])
            source = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
            ptx = triton.compile(source, target=TARGET, options=kernel._create_compile_options(kernel.configs[0], meta)).asm["ptx"]
            fused = re.findall(r"fma\.rn\.f32.*", ptx)
            # Harmless: a product to which nothing is added, and one by 2 ** -17, which is exact.
            assert all(line.endswith(" 0f00000000;") or " 0f37000000," in line for line in fused), (name, fused)
            yield name


def gradient_code() -> tuple[GraphLowering, str]:
    """Of `step`, as the pass meets it: behind AOTAutograd."""
    with MODE, torch.device("cuda:0"):
        states = [(torch.empty(layout.state_numel), torch.empty(3), torch.empty(3, 5, dtype=torch.int64)) for layout in (LOCAL, OWNED)]
        inputs = [torch.empty(NUMEL, 1, dtype=torch.bfloat16), torch.empty(8, 3, 40), *states[0], *states[1]]
        traced = make_fx(step, select_decomp_table())(*inputs)
    with V.set_fake_mode(MODE), tracing(TracingContext(MODE)), inductor_config.patch(post_grad_custom_post_pass=InlineKernels([])):
        return generate(lambda: compile_fx_inner(traced, inputs))


def activation_code() -> tuple[GraphLowering, str]:
    """Of `exchange`, from Dynamo on, and for any number of rows."""
    with fake_group(2), MODE, torch.no_grad():
        x, indices = torch.empty(32, 3, 40, device="cuda:0"), torch.empty(64, dtype=torch.int64, device="cuda:0")
        for tensor in (x, indices):
            torch._dynamo.mark_dynamic(tensor, 0)
        compiled_exchange = torch.compile(exchange, backend="dct", options={"inline_kernels": True, "mp_outputs": True})
        return generate(lambda: compiled_exchange(x, indices, torch.empty(1000, 40, device="cuda:0")))


def check_gradients(lowering: GraphLowering, body: str) -> None:
    """Its state is written in place, by the kernels alone, and the gradient is computed once."""
    grad, _, *state = lowering.graph_input_names
    assert sorted(lowering.mutated_inputs) == sorted(state)
    assert not lowering.mutated_buffers & lowering.constants.keys()
    others = [line for line in body.splitlines() if ".run(" in line and "_kernel_" not in line]
    assert not any(name in line for name in state for line in others)
    assert re.search(rf"run\({grad}, buf\d+, {NUMEL}, stream", "".join(line for line in others if grad in line)), others


if __name__ == "__main__":
    inductor_config.compile_threads = 1
    inductor_config.fx_graph_cache = False
    names: set[str] = set()
    for found, text in (gradient_code(), activation_code()):
        assert "ops.dct" not in calls(text)
        if found.mutated_inputs:
            check_gradients(found, calls(text))
        else:
            assert "[code_for_cuda.py:" in calls(text)  # the site's name
        names.update(compiled(text))
    print(*sorted(names))
