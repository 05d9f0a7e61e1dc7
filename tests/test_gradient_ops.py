"""The gradient operators as torch sees them: schemas, fakes, mutation, and that every one checks its arguments."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dct_compile.ops import repack, select_threshold, threshold_pack, unpack_accumulate, unpack_into
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.layout import GradientLayout, Selection

needs_compiler = pytest.mark.skipif(load_library() is None, reason="no C++ compiler")

NUMEL = 810
EXACT = Selection(0.1, "exact", 0.0, 1, "off")


def layout_of(value_dtype: torch.dtype, chunks: int = 1, chunk: int = -1, block: int = 256) -> GradientLayout:
    return GradientLayout(((3, 400), (500, 300)), block, chunks, chunk, 0.3, value_dtype)


def state(numel: int = 700) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(numel), torch.ones(2), torch.zeros(2, 5, dtype=torch.int64)


def pack_arguments(dtype: torch.dtype, value_dtype: torch.dtype, chunks: int, chunk: int) -> tuple[Any, ...]:
    layout = layout_of(value_dtype, chunks, chunk)
    grad = torch.randn(NUMEL if chunk < 0 else layout.state_numel).to(dtype)
    return (grad, *state(layout.state_numel), layout, True)


GEOMETRIES = [
    (torch.float32, torch.float32, 1, -1),
    (torch.bfloat16, torch.bfloat16, 3, -1),
    (torch.float16, torch.bfloat16, 3, 1),
    (torch.float32, torch.int8, 2, -1),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_select_threshold_opcheck(geometry: tuple[torch.dtype, torch.dtype, int, int]) -> None:
    *tensors, layout, feedback = pack_arguments(*geometry)
    torch.library.opcheck(select_threshold, (*tensors, layout, Selection(0.1, "exact", 0.0, 10, "geometric"), feedback))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_threshold_pack_opcheck(geometry: tuple[torch.dtype, torch.dtype, int, int]) -> None:
    torch.library.opcheck(threshold_pack, pack_arguments(*geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("with_dense", [True, False])
def test_unpack_accumulate_opcheck(geometry: tuple[torch.dtype, torch.dtype, int, int], with_dense: bool) -> None:
    arguments = pack_arguments(*geometry)
    payload = threshold_pack(*arguments)
    numel = arguments[0].numel()
    dense = torch.randn(numel - arguments[1].numel()) if with_dense else None
    torch.library.opcheck(unpack_accumulate, (torch.cat([payload, payload]), dense, numel, geometry[0], arguments[4], 2))
    torch.library.opcheck(unpack_into, (torch.empty(numel, dtype=geometry[0]), payload, dense, arguments[4], 2))


def test_repack_opcheck() -> None:
    *tensors, layout, feedback = pack_arguments(torch.float32, torch.int8, 2, 1)
    payload = threshold_pack(*tensors, layout, feedback)
    torch.library.opcheck(repack, (torch.cat([payload, payload]), *state(layout.state_numel), layout, EXACT, feedback))


def test_state_saved_for_backward_may_change() -> None:
    """A residual that a graph has saved is updated in the next step; autograd must not object."""
    arguments = pack_arguments(torch.float32, torch.bfloat16, 1, -1)
    versions = [tensor._version for tensor in arguments[1:4]]
    select_threshold(*arguments[:5], EXACT, True)
    threshold_pack(*arguments)
    assert [tensor._version for tensor in arguments[1:4]] == versions
    assert arguments[3][:, 0].tolist() == [1, 1]


def test_in_a_compiled_function_the_state_changes_in_place() -> None:
    def reduce(grad: Tensor, residual: Tensor, threshold: Tensor, counters: Tensor) -> Tensor:
        select_threshold(grad, residual, threshold, counters, layout, EXACT, True)
        payload = threshold_pack(grad, residual, threshold, counters, layout, True)
        return unpack_accumulate(payload, None, NUMEL, torch.float32, layout, 2)  # type: ignore[no-any-return]

    layout = layout_of(torch.bfloat16)
    grad = torch.randn(NUMEL)
    eager_state, compiled_state = state(), state()
    expected = reduce(grad, *eager_state)
    found = torch.compile(reduce, backend="aot_eager", fullgraph=True)(grad, *compiled_state)
    assert torch.equal(found, expected)
    for a, b in zip(compiled_state, eager_state, strict=True):
        assert torch.equal(a, b)
    assert eager_state[2][:, 1].tolist() == [40, 30]


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(799), "grad is"),
        (0, torch.zeros(810, dtype=torch.float64), "grad is"),
        (0, torch.zeros(810, dtype=torch.int8), "grad is"),
        (1, torch.zeros(699), "residual is"),
        (1, torch.zeros(1400)[::2], "residual is"),
        (2, torch.zeros(2, dtype=torch.float64), "threshold is"),
        (3, torch.zeros(2, 5, dtype=torch.int32), "counters is"),
    ],
)
def test_a_wrong_tensor_is_named(position: int, wrong: Tensor, message: str) -> None:
    arguments = list(pack_arguments(torch.float32, torch.float32, 1, -1))
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        threshold_pack(*arguments)


@needs_compiler
def test_a_wrong_dtype_or_block_is_named() -> None:
    arguments = pack_arguments(torch.float32, torch.float32, 1, -1)
    with pytest.raises(ValueError, match=r"value_dtype is torch\.float64: expected one of .*torch\.int8"):
        threshold_pack(*arguments[:4], layout_of(torch.float64), True)
    for block in (32, 300, 2**32):
        with pytest.raises(ValueError, match=f"block is {block}: expected a power of two"):
            threshold_pack(*arguments[:4], layout_of(torch.float32, block=block), True)
    payload = threshold_pack(*arguments)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8: expected one of torch\.float32, torch\.bfloat16, torch\.float16"):
        unpack_accumulate(payload, None, NUMEL, torch.int8, arguments[4], 1)


@needs_compiler
def test_what_an_owner_packs_again_is_checked() -> None:
    layout = layout_of(torch.int8, 2, 1)
    numel = layout.state_numel
    payload = threshold_pack(*pack_arguments(torch.float32, torch.int8, 2, 1))
    with pytest.raises(ValueError, match="gathered is"):
        repack(payload[:-4], *state(numel), layout, EXACT, True)
    with pytest.raises(ValueError, match="residual is"):
        repack(payload, *state(numel + 1), layout, EXACT, True)
    assert repack(payload, *state(numel), layout, EXACT, True).shape == payload.shape


def test_gathered_bytes_must_be_whole_payloads() -> None:
    layout = layout_of(torch.bfloat16, 2)
    chunk_bytes = layout.chunk_bytes
    for size in (chunk_bytes, 2 * chunk_bytes - 1):
        with pytest.raises(ValueError, match="gathered is"):
            unpack_accumulate(torch.zeros(size, dtype=torch.uint8), None, NUMEL, torch.float32, layout, 1)
    with pytest.raises(ValueError, match="dense has"):
        unpack_accumulate(torch.zeros(2 * chunk_bytes, dtype=torch.uint8), torch.zeros(7), NUMEL, torch.float32, layout, 1)


def test_without_a_compiler_the_references_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pack_arguments(torch.float32, torch.bfloat16, 1, -1)
    expected = threshold_pack(*arguments[:1], *state(), *arguments[4:])
    monkeypatch.setattr("dct_compile.ops.library.is_ready", lambda: False)
    assert torch.equal(threshold_pack(*arguments[:1], *state(), *arguments[4:]), expected)
    assert unpack_accumulate(expected, None, NUMEL, torch.float32, arguments[4], 1).count_nonzero() > 0
    owned = layout_of(torch.bfloat16, 2, 0)
    part = threshold_pack(torch.randn(owned.state_numel), *state(owned.state_numel), owned, True)
    assert repack(part, *state(owned.state_numel), owned, EXACT, True).any()
    chosen = state()
    select_threshold(arguments[0], *chosen, arguments[4], EXACT, True)
    assert (chosen[1] != 1).all()


BARE_MACHINE = """
import sys
sys.modules["triton"] = None
import torch
from dct_compile.ops import threshold_pack
from dct_compile.triton_kernels.layout import GradientLayout
state = torch.zeros(9), torch.zeros(1), torch.zeros(1, 5, dtype=torch.int64)
for _ in range(2):
    threshold_pack(torch.ones(9), *state, GradientLayout(((0, 9),), 256, 1, -1, 1.0, torch.bfloat16), True)
print(state[2].tolist())
"""


def test_a_machine_without_triton_and_compiler_warns_once(tmp_path: Path) -> None:
    own = {"CXX": "no-such-compiler", "DCT_COMPILE_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", BARE_MACHINE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[2, 18, 0, 0, 9]]"
    assert done.stderr.count("could not be compiled") == 1
