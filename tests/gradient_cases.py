"""Buckets for the tests of the gradient kernels, and the implementations that must agree to the byte."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.gradient import repack_cpu, select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu
from dct_compile.triton_kernels.layout import WHOLE_PIECE, GradientLayout, Selection
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.repack_triton import repack_triton
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack import threshold_pack_reference
from dct_compile.triton_kernels.threshold_pack_triton import threshold_pack_triton
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_accumulate_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUE_DTYPES = (*DTYPES, torch.int8)
BLOCKS = (256, 4096, WHOLE_PIECE)
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.int8),
]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Implementation:
    select: Callable[..., None]
    pack: Callable[..., Tensor]
    unpack: Callable[..., Tensor]
    repack: Callable[..., Tensor]
    device: str = "cpu"


REFERENCE = Implementation(select_threshold_reference, threshold_pack_reference, unpack_accumulate_reference, repack_reference)
CPU = Implementation(select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu, repack_cpu)
TRITON = Implementation(select_threshold_triton, threshold_pack_triton, unpack_accumulate_triton, repack_triton, DEVICE)
COMPILED = [
    pytest.param(CPU, id="cpu", marks=pytest.mark.skipif(load_library() is None, reason="no C++ compiler")),
    pytest.param(TRITON, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")),
]
ALL = [pytest.param(REFERENCE, id="reference"), *COMPILED]


def selection(density: float, method: str, **options: Any) -> Selection:
    """Due at every step, unless ``options`` say otherwise; a fixed threshold is 0.5."""
    return Selection(density, method, **{"fixed": 0.5, "refresh_interval": 1, "refresh_warmup": "off", **options})


@dataclass
class Bucket:
    """A bucket's arguments and state."""

    segments: tuple[tuple[int, int], ...]
    numel: int
    block: int = 256
    chunks: int = 1
    chunk: int = -1
    capacity: float = 1.0
    value_dtype: torch.dtype = torch.float32
    feedback: bool = True
    state: tuple[Tensor, Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        counters = torch.zeros(len(self.segments), 5, dtype=torch.int64)
        self.state = torch.zeros(self.layout.state_numel), torch.full((len(self.segments),), INF), counters

    @property
    def layout(self) -> GradientLayout:
        return GradientLayout(self.segments, self.block, self.chunks, self.chunk, self.capacity, self.value_dtype)

    def compressed(self, bucket: Tensor) -> Tensor:
        """The elements of the segments, or of the owner's pieces, in the order of the residual."""
        ranges = self.segments if self.chunk < 0 else [(piece.grad_offset, piece.numel) for piece in self.layout.pieces]
        return torch.cat([bucket[offset : offset + numel] for offset, numel in ranges] or [bucket[:0]])

    def select(self, implementation: Implementation, grad: Tensor, density: float, method: str = "exact", **options: Any) -> None:
        state = self._state_on(implementation.device)
        implementation.select(grad.to(implementation.device), *state, self.layout, selection(density, method, **options), self.feedback)
        self._keep(state)

    def pack(self, implementation: Implementation, grad: Tensor) -> Tensor:
        state = self._state_on(implementation.device)
        payload = implementation.pack(grad.to(implementation.device), *state, self.layout, self.feedback)
        self._keep(state)
        return payload.cpu()

    def repack(self, implementation: Implementation, gathered: Tensor, density: float, method: str = "exact", **options: Any) -> Tensor:
        state = self._state_on(implementation.device)
        how = selection(density, method, **options)
        payload = implementation.repack(gathered.to(implementation.device), *state, self.layout, how, self.feedback)
        self._keep(state)
        return payload.cpu()

    def unpack(
        self,
        implementation: Implementation,
        gathered: Tensor,
        dtype: torch.dtype = torch.float32,
        divisor: int = 1,
        dense: Tensor | None = None,
    ) -> Tensor:
        device = implementation.device
        dense = None if dense is None else dense.to(device)
        return implementation.unpack(gathered.to(device), dense, self.numel, dtype, self.layout, divisor).cpu()

    def _state_on(self, device: str) -> list[Tensor]:
        return [tensor.to(device) for tensor in self.state]

    def _keep(self, state: list[Tensor]) -> None:
        self.state = tuple(tensor.cpu() for tensor in state)  # type: ignore[assignment]

    def copy(self) -> "Bucket":
        twin = Bucket(self.segments, self.numel, self.block, self.chunks, self.chunk, self.capacity, self.value_dtype, self.feedback)
        twin.state = tuple(tensor.clone() for tensor in self.state)  # type: ignore[assignment]
        return twin


def one_segment(numel: int, **options: Any) -> Bucket:
    return Bucket(((0, numel),), numel, **options)


def with_gaps(**options: Any) -> Bucket:
    """Three parameters of which one is empty, one shorter than a block and one longer than three blocks, with dense ones between."""
    return Bucket(((5, 700), (705, 0), (800, 100), (907, 1793)), 2711, **options)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, but that one NaN is as good as another."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    words = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return all(
        torch.equal(x, y) for x, y in ((a.isnan(), b.isnan()), (a.nan_to_num(nan=7.0).view(words), b.nan_to_num(nan=7.0).view(words)))
    )


def assert_same_state(bucket: Bucket, twin: Bucket) -> None:
    for found, wanted in zip(bucket.state, twin.state, strict=True):
        assert same(found, wanted)


def assert_agree(implementation: Implementation, bucket: Bucket, grad: Tensor) -> Tensor:
    """One step by the implementation and by the reference: same payload, same state. ``bucket`` goes on with that state."""
    twin = bucket.copy()
    expected = twin.pack(REFERENCE, grad)
    payload = bucket.pack(implementation, grad)
    assert torch.equal(payload, expected)
    assert_same_state(bucket, twin)
    return payload
