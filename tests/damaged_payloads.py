"""Feeds random bytes to every decoder, with memory around payloads and results that nobody may touch. Run in a process of its own."""

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.gradient import repack_cpu, unpack_accumulate_cpu
from dct_compile.triton_kernels.cpu.rows import dequantize_rows_cpu, gather_rows_cpu, scatter_rows_cpu, unpack_rows_cpu
from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, RowLayout, Selection, quantized_row_bytes
from dct_compile.triton_kernels.quantize import dequantize_rows_reference
from dct_compile.triton_kernels.quantize_triton import dequantize_rows_triton
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.repack_triton import repack_triton
from dct_compile.triton_kernels.rows_pack import pack_rows_reference
from dct_compile.triton_kernels.rows_unpack import gather_rows_reference, scatter_rows_reference, unpack_rows_reference
from dct_compile.triton_kernels.rows_unpack_triton import gather_rows_triton, scatter_rows_triton, unpack_rows_triton
from dct_compile.triton_kernels.threshold_pack import chunk_view, threshold_pack_reference
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_accumulate_triton

IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "reference": (
        unpack_accumulate_reference,
        repack_reference,
        unpack_rows_reference,
        gather_rows_reference,
        scatter_rows_reference,
        dequantize_rows_reference,
    ),
    "cpu": (unpack_accumulate_cpu, repack_cpu, unpack_rows_cpu, gather_rows_cpu, scatter_rows_cpu, dequantize_rows_cpu),
    "triton": (
        unpack_accumulate_triton,
        repack_triton,
        unpack_rows_triton,
        gather_rows_triton,
        scatter_rows_triton,
        dequantize_rows_triton,
    ),
}
PAYLOADS = 300
AT_ONCE = 20
"""Payloads that a call of a gradient decoder adds up."""
ROWS = ((100, 7), (256, 256), (257, 20), (1, 1), (2000, 300), (40, 2))
"""Widths and capacities."""
GUARD = 192
_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)


class Fences:
    """Makes tensors whose memory ends where a page begins that nobody may touch, with bytes before them that must stay as they are."""

    def __init__(self) -> None:
        self.guards: list[Tensor] = []
        self.maps: list[mmap.mmap] = []

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        used = prod(sizes) * dtype.itemsize
        pages = -(-(used + GUARD) // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
        self.maps.append(memory)
        flat = torch.frombuffer(memory, dtype=torch.uint8)[: pages * mmap.PAGESIZE]
        end = ctypes.c_void_p(flat.data_ptr() + flat.numel())
        assert _LIBC.mprotect(end, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE) == 0
        self.guards.append(flat[: flat.numel() - used].fill_(0xA5))
        return torch.frombuffer(memory, dtype=dtype, count=prod(sizes), offset=flat.numel() - used).view(sizes) if used else torch.Tensor()

    def zeros(self, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        return self.empty(*shape, dtype=dtype).zero_()

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def check(self) -> None:
        assert all(bool((guard == 0xA5).all()) for guard in self.guards), "memory before a tensor was written"


def fenced(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls ``function`` with fenced copies of its tensors; what it makes itself is fenced too."""
    fences = Fences()
    own = [fences.copy(argument) if isinstance(argument, Tensor) else argument for argument in arguments]
    with patch.object(torch, "empty", fences.empty), patch.object(torch, "zeros", fences.zeros):
        function(*own)
    fences.check()


def damaged(whole: Tensor, seed: int) -> Tensor:
    """Returns bytes like ``whole`` [payloads, bytes]: random ones, large ones, or those of ``whole`` but for a few."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, whole.shape, dtype=torch.uint8, generator=generator)
    if seed % 3 == 0:
        return noise
    if seed % 3 == 1:
        return noise | torch.randint(0, 2, whole.shape[:1], dtype=torch.uint8, generator=generator)[:, None] * 255
    return torch.where(torch.rand(whole.shape, generator=generator) < 0.03, noise, whole)


def layouts(chunk: int, segments: tuple[tuple[int, int], ...]) -> Iterator[GradientLayout]:
    for block, dtype in ((256, torch.bfloat16), (4096, torch.int8), (WHOLE_PIECE, torch.float16), (64, torch.int8), (1024, torch.float32)):
        yield GradientLayout(segments, block, 2, chunk, 0.05, dtype)


def owner_state(layout: GradientLayout, seed: int) -> tuple[Tensor, ...]:
    count = len(layout.segments)
    counters = torch.full((count, 5), seed, dtype=torch.int64)
    return torch.zeros(layout.state_numel), torch.full((count,), 0.1), counters


def gradients(name: str, segments: tuple[tuple[int, int], ...], payloads: int) -> None:
    """Gives ``payloads`` damaged payloads to `unpack_accumulate` and to `repack`."""
    unpack, repack = IMPLEMENTATIONS[name][:2]
    numel = sum(segments[-1]) + 7
    for whole, owned in zip(layouts(-1, segments), layouts(1, segments), strict=True):
        grad = torch.randn(owned.state_numel, generator=torch.Generator().manual_seed(1))
        for seed in range(payloads // AT_ONCE // 5):
            chunk = threshold_pack_reference(grad, *owner_state(owned, seed), owned, True).expand(AT_ONCE, -1)
            gathered = damaged(chunk, seed).flatten()
            selection = Selection(0.1, "fixed", 0.5, 1, "off") if seed % 2 else Selection(0.1, "exact", 0.0, 2, "off")
            fenced(repack, gathered, *owner_state(owned, seed), owned, selection, seed % 3 != 0)
            fenced(unpack, gathered, None, numel, torch.bfloat16, whole, 3)


def a_sum_that_changes(name: str) -> None:
    """Gives `repack` a count that is larger than its block.

    Whoever begins to read behind that block passes over more entries than who comes from it, and may find another sum the second time.
    """
    layout = GradientLayout(((0, 8192), (8192, 8192)), 4096, 1, 0, 0.5, torch.float32)
    gathered = torch.zeros(3, layout.chunk_bytes, dtype=torch.uint8)
    counts = ((60000 - 65536, 0, 4096, 0), (0, 0, 4096, 4096), (4096, 0, 0, 0))
    for number, payload in enumerate(gathered):
        chunk = chunk_view(payload, layout)
        chunk.counts.copy_(torch.tensor(counts[number]))
        chunk.indices.copy_(torch.arange(8192) % 4096)
        chunk.values.fill_(float(number > 0))
        if number == 0:
            chunk.values[4096:5096] = -1.0
    fenced(IMPLEMENTATIONS[name][1], gathered.flatten(), *owner_state(layout, 1), layout, Selection(0.1, "fixed", 0.5, 1, "off"), False)


def rows(name: str) -> None:
    """Gives `PAYLOADS` damaged rows to each decoder of rows."""
    _, _, unpack, gather, scatter, dequantize = IMPLEMENTATIONS[name]
    count = PAYLOADS // len(ROWS)
    for seed, (width, capacity) in enumerate(ROWS):
        layout = RowLayout((width,), capacity, (torch.bfloat16, torch.float16, torch.float32)[seed % 3])
        x = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        payload = damaged(pack_rows_reference(x, layout, "exact", 0.1, 0.0), seed)
        fenced(unpack, payload, layout, 1 + seed % 2, torch.bfloat16)
        fenced(gather, x[: count // 2], payload, layout, torch.float16)
        fenced(scatter, x[:, :capacity].repeat(2, 1), payload, layout, 2, torch.float16)
        bits = (8, 4)[seed % 2]
        codes = damaged(torch.zeros(count, quantized_row_bytes(width, bits), dtype=torch.uint8), seed)
        fenced(dequantize, codes, [width], bits, torch.float16)


def main() -> None:
    """Does all of it, and says so: with two threads on the CPU, where a large bucket is shared between them."""
    torch.set_num_threads(2)
    for name in ("reference", *(("cpu",) if load_library() is not None else ()), *(("triton",) if HAS_TRITON else ())):
        rows(name)
        a_sum_that_changes(name)
        gradients(name, ((5, 700), (705, 0), (800, 4500)), PAYLOADS)
        if name == "cpu":
            gradients(name, ((5, 300_000), (300_010, 70_000)), 2 * 5 * AT_ONCE)
        print(name)
