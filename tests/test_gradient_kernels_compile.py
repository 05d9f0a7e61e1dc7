"""Every launch of the kernels of gradients and moments passes Triton's compiler for CUDA, which needs no device.

The interpreter accepts more than that compiler. The tensors are fake ones on a CUDA device: an op that reads a value on the host, and so
could not be part of a CUDA graph, fails here.
"""

import os
import subprocess
import sys

import pytest

from dct_compile.triton_kernels.compat import HAS_TRITON

SCRIPT = """
import re

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, Selection
from dct_compile.triton_kernels.moments_triton import prepare_moments_triton
from dct_compile.triton_kernels.repack_triton import repack_triton
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack_triton import threshold_pack_triton
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_accumulate_triton
from tests.fake_cuda import TARGET, fake_tables

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}
TYPES |= {torch.int16: "*i16", torch.uint8: "*u8"}
OPTIONS = ("num_warps",)
compiled = {}


def type_of(argument):
    return TYPES[argument.dtype] if isinstance(argument, torch.Tensor) else "fp32" if isinstance(argument, float) else "i64"


def launch(kernel, grid):
    def record(*arguments, **keywords):
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        constants = {p.name: keywords.pop(p.name) for p in kernel.params if p.is_constexpr}
        names = [p.name for p in kernel.params if p.name not in constants | keywords]
        found = dict(zip(names, arguments, strict=True)) | keywords
        signature = {name: type_of(argument) for name, argument in found.items()} | dict.fromkeys(constants, "constexpr")
        key = (kernel.__name__, str(signature), str(constants), str(options))
        if key not in compiled:
            source = ASTSource(kernel, {p.name: signature[p.name] for p in kernel.params}, constexprs=constants)
            ptx = triton.compile(source, target=TARGET, options=options).asm["ptx"]
            assert ".ftz" not in ptx and "div.full" not in ptx, key
            fused = re.findall("fma.rn.f32.*", ptx)
            assert all(line.endswith(" 0f00000000;") for line in fused), key  # a product to which nothing is added
            compiled[key] = ptx

    return record


JITFunction.__getitem__ = launch
SEGMENTS = ((3, 700), (703, 0), (800, 9000))


def run(block, grad_dtype, value_dtype, chunks, chunk):
    layout = GradientLayout(SEGMENTS, block, chunks, chunk, 0.1, value_dtype)
    numel = layout.state_numel if chunk >= 0 else 10000
    state = (torch.zeros(layout.state_numel), torch.zeros(3), torch.zeros(3, 5, dtype=torch.int64))
    grad = torch.zeros(numel, dtype=grad_dtype)
    for method in ("exact", "sampled", "laplace", "fixed"):
        select_threshold_triton(grad, *state, layout, Selection(0.05, method, 0.0, 10, "geometric", True), True)
    payload = threshold_pack_triton(grad, *state, layout, True)
    unpack_accumulate_triton(payload.repeat(2), None, numel, grad_dtype, layout, 2)
    if chunk >= 0:
        for method in ("exact", "fixed"):
            repack_triton(payload.repeat(3), *state, layout, Selection(0.05, method, 0.0, 10, "off", True), True)


def run_moments(dtype):
    grad, last = torch.zeros(3, 700, dtype=dtype), torch.zeros(3, 700, dtype=torch.int32)
    for decays in (False, True):
        prepare_moments_triton(torch.zeros(5), torch.zeros(9), [grad], [grad] * decays, [grad.clone()], [grad.clone()], [last])
    prepare_moments_triton(torch.zeros(5), None, [grad, grad.t()], [], [grad.clone(), grad.t()], [], [])


mode = FakeTensorMode()
with fake_tables(mode), mode, torch.device("cuda"):
    run(256, torch.float32, torch.bfloat16, 1, -1)
    run(256, torch.bfloat16, torch.int8, 4, 1)
    run(4096, torch.float16, torch.float16, 4, -1)
    run(WHOLE_PIECE, torch.float32, torch.int8, 4, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run_moments(dtype)
print("compiled", " ".join(sorted({key[0] for key in compiled})))
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_the_kernels_compile_for_cuda() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    kernels = "constant fill hold mean pack prepare_moments rank repack unpack"
    assert done.stdout.split() == ["compiled", *(f"{name}_kernel" for name in kernels.split())], done.stderr
