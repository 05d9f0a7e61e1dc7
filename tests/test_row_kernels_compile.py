"""The row kernels pass Triton's compiler for CUDA, which needs no device; the interpreter accepts more than it does."""

import os
import subprocess
import sys

import pytest

from dct_compile.triton_kernels.compat import HAS_TRITON

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dct_compile.triton_kernels.quantize_triton import dequantize_rows_kernel, quantize_rows_kernel
from dct_compile.triton_kernels.rows_pack_triton import pack_rows_kernel
from dct_compile.triton_kernels.rows_unpack_triton import dense_rows_kernel, gather_rows_kernel


def ptx(kernel, pointers, **constants):
    signature = {name: pointers.get(name, "constexpr") for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)).asm["ptx"]


WIRE = {"payload_ptr": "*u8"}
FLOATS = {0: "*fp32", 1: "*i16", 2: "*fp16"}
BYTES = {0: 4, 1: 2, 2: 2}
for code in FLOATS:
    bits = "*i32" if code == 0 else "*i16"
    sizes = dict(WIDTH=1000, CAPACITY=50, ROW_BYTES=50 * (BYTES[code] + 2))
    pack = dict(sizes, SOURCE=code, VALUE=code, VALUE_BYTES=BYTES[code], INDEX_BYTES=2, INFINITY=0x7F800000, BLOCK=1024, ENTRIES=64)
    for laplace in (False, True):
        ptx(pack_rows_kernel, WIRE | {"x_ptr": FLOATS[code], "bound": "fp32"}, LAPLACE=laplace, **pack)
    dense = dict(sizes, STEPS=6, ADDENDS=2, PAYLOAD_BYTES=BYTES[code], VALUE=code, OUT=code, BLOCK=1024)
    for apart in (False, True):
        ptx(dense_rows_kernel, WIRE | {"values_ptr": FLOATS[code], "out_ptr": bits, "rows": "i32"}, VALUES_APART=apart, **dense)
    gather = dict(sizes, PAYLOAD_BYTES=BYTES[code], SOURCE=code, VALUE=code, ENTRIES=64)
    ptx(gather_rows_kernel, WIRE | {"grad_ptr": FLOATS[code], "out_ptr": bits, "grad_rows": "i32"}, **gather)
    for entries, qmax in ((1, 127), (2, 7)):
        codec = dict(WIDTH=1001, ENTRIES=entries, ROW_BYTES=1003)
        text = ptx(quantize_rows_kernel, WIRE | {"x_ptr": FLOATS[code], "seed_ptr": "*i64"}, SOURCE=code, QMAX=qmax, BLOCK=1024, **codec)
        assert "div.rn.f32" in text and "div.full" not in text and ".ftz" not in text
        ptx(dequantize_rows_kernel, WIRE | {"out_ptr": bits}, OUT=code, LARGEST=65504.0, BLOCK=1024, **codec)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
def test_the_kernels_compile_for_cuda() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
