"""The gradient kernels: every implementation agrees with the PyTorch reference to the byte, and the reference with [Gupta21]."""

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.gradient import repack_cpu, select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu
from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE, GradientLayout, choose_block, gradient_layout
from dct_compile.triton_kernels.repack import repack_reference
from dct_compile.triton_kernels.repack_triton import repack_triton
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack import chunk_view, threshold_pack_reference
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
    repack: Callable[..., Tensor] | None = None
    device: str = "cpu"


REFERENCE = Implementation(select_threshold_reference, threshold_pack_reference, unpack_accumulate_reference, repack_reference)
CPU = Implementation(select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu, repack_cpu)
TRITON = Implementation(select_threshold_triton, threshold_pack_triton, unpack_accumulate_triton, repack_triton, DEVICE)
COMPILED = [
    pytest.param(CPU, id="cpu", marks=pytest.mark.skipif(load_library() is None, reason="no C++ compiler")),
    pytest.param(TRITON, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")),
]
ALL = [pytest.param(REFERENCE, id="reference"), *COMPILED]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN or the largest integer: whoever reads or leaves them fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Bucket:
    """A bucket's arguments and state."""

    segments: tuple[int, ...]
    numel: int
    block: int = 256
    chunks: int = 1
    chunk: int = -1
    capacity: float = 1.0
    value_dtype: torch.dtype = torch.float32
    feedback: bool = True
    state: tuple[Tensor, Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        parameters = len(self.segments) // 2
        counters = torch.zeros(parameters, 4, dtype=torch.int64)
        self.state = torch.zeros(self.layout.state_numel), torch.full((parameters,), INF), counters

    @property
    def geometry(self) -> tuple[Any, ...]:
        return list(self.segments), self.block, self.chunks, self.chunk

    @property
    def layout(self) -> GradientLayout:
        return gradient_layout(self.segments, self.block, self.chunks, self.chunk, self.capacity, self.value_dtype)

    def compressed(self, bucket: Tensor) -> Tensor:
        """The elements of the pieces, in the order of the residual."""
        order = sorted(self.layout.pieces, key=lambda piece: piece.state_offset)
        return torch.cat([bucket[piece.grad_offset : piece.grad_offset + piece.numel] for piece in order] or [bucket[:0]])

    def select(self, implementation: Implementation, grad: Tensor, density: float, method: str = "exact", **options: Any) -> None:
        settings = {"fixed": 0.5, "refresh_interval": 1, "refresh_warmup": "off", **options}
        device = implementation.device
        state = [tensor.to(device) for tensor in self.state]
        implementation.select(grad.to(device), *state, *self.geometry, density, method, *settings.values(), self.feedback)
        self.state = tuple(tensor.cpu() for tensor in state)  # type: ignore[assignment]

    def pack(self, implementation: Implementation, grad: Tensor) -> Tensor:
        device = implementation.device
        state = [tensor.to(device) for tensor in self.state]
        payload = implementation.pack(grad.to(device), *state, *self.geometry, self.capacity, self.value_dtype, self.feedback)
        self.state = tuple(tensor.cpu() for tensor in state)  # type: ignore[assignment]
        return payload.cpu()

    def repack(self, implementation: Implementation, gathered: Tensor, density: float, method: str = "exact", **options: Any) -> Tensor:
        assert implementation.repack is not None
        settings = {"fixed": 0.5, "refresh_interval": 1, "refresh_warmup": "off", **options}
        device = implementation.device
        state = [tensor.to(device) for tensor in self.state]
        wire = (self.capacity, self.value_dtype)
        arguments = (*self.geometry, *wire, density, method, *settings.values(), self.feedback)
        payload = implementation.repack(gathered.to(device), *state, *arguments)
        self.state = tuple(tensor.cpu() for tensor in state)  # type: ignore[assignment]
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
        arguments = (dense, self.numel, dtype, *self.geometry, self.capacity, self.value_dtype, divisor)
        return implementation.unpack(gathered.to(device), *arguments).cpu()

    def copy(self) -> "Bucket":
        twin = Bucket(self.segments, self.numel, self.block, self.chunks, self.chunk, self.capacity, self.value_dtype, self.feedback)
        twin.state = tuple(tensor.clone() for tensor in self.state)  # type: ignore[assignment]
        return twin


def one_segment(numel: int, **options: Any) -> Bucket:
    return Bucket((0, numel), numel, **options)


def with_gaps(**options: Any) -> Bucket:
    """Three parameters of which one is empty, one shorter than a block and one longer than three blocks, with dense ones between."""
    return Bucket((5, 700, 705, 0, 800, 100, 907, 1793), 2711, **options)


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


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize(("grad_dtype", "value_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("block", "chunks", "chunk"), [(256, 1, -1), (256, 3, -1), (256, 3, 1), (WHOLE_PIECE, 2, -1)])
def test_pack_agrees(
    implementation: Implementation, value_dtype: torch.dtype, grad_dtype: torch.dtype, block: int, chunks: int, chunk: int
) -> None:
    bucket = with_gaps(block=block, chunks=chunks, chunk=chunk, capacity=0.08, value_dtype=value_dtype)
    torch.manual_seed(chunks + chunk)
    for step in range(3):  # more is wanted than fits: the window moves on
        grad = torch.randn(bucket.numel).to(grad_dtype)
        bucket.state[1].fill_(1.2 + step / 4)
        assert_agree(implementation, bucket, grad)
    assert bucket.state[2][:, 2].sum() > 0


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 255, 256, 257])
@pytest.mark.parametrize("feedback", [True, False])
def test_pack_agrees_at_the_edges_of_a_block(implementation: Implementation, numel: int, feedback: bool) -> None:
    bucket = one_segment(numel, feedback=feedback, value_dtype=torch.bfloat16)
    bucket.state[0].copy_(torch.randn(numel))
    for tau in (0.0, 0.7, INF):  # all (256 do not fit into the count of a block), some, none
        bucket.state[1].fill_(tau)
        payload = assert_agree(implementation, bucket, torch.randn(numel))
    assert not payload.any()


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("block", [4096, WHOLE_PIECE])
@pytest.mark.parametrize("value_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("capacity", [0.4, 1.0])
def test_pack_agrees_with_large_blocks(implementation: Implementation, block: int, value_dtype: torch.dtype, capacity: float) -> None:
    bucket = Bucket((3, TILE - 1, TILE + 2, 2 * TILE + 1), 3 * TILE + 10, block=block, chunks=2, capacity=capacity, value_dtype=value_dtype)
    for tau in (0.0, 0.7):
        bucket.state[1].fill_(tau)
        assert_agree(implementation, bucket, torch.randn(bucket.numel))


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("capacity", [0.0, 1e-9, 0.5, 1.0])
def test_pack_agrees_at_any_capacity(implementation: Implementation, value_dtype: torch.dtype, block: int, capacity: float) -> None:
    """From no entry over one to all of them."""
    bucket = one_segment(600, block=block, capacity=capacity, value_dtype=value_dtype)
    bucket.state[1].fill_(0.3)
    for _ in range(2):
        assert_agree(implementation, bucket, torch.randn(600))


SPECIAL = [
    [0.5, -0.5, 0.49999997, -0.49999997, 0.50000006],  # at the threshold and next to it
    [-1.0, -2.0, -3.0, -0.1],
    [0.0, -0.0, 1e-45, -1e-45, 1.17549421e-38, 1e-30],
    [65504.0, 65519.0, 65520.0, -1e6, 3.4e38, -3.4028234e38],
    [2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 6.1e-5, 1.00390625, 1.01171875],  # float16 denormals, ties of bfloat16
    [NAN, 1.0, INF, -INF, 0.2],
    [-NAN, 0.0],
    [190 * 2.0**-149, 2.0**-149, -(2.0**-149)],  # of so few bits that a code of int8 would be 190
]


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("values", SPECIAL)
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_pack_agrees_on_special_values(implementation: Implementation, value_dtype: torch.dtype, values: list[float], tau: float) -> None:
    for numel in (len(values), 200):
        grad = torch.zeros(numel)
        grad[-len(values) :] = torch.tensor(values)
        bucket = one_segment(numel, value_dtype=value_dtype)
        bucket.state[1].fill_(tau)
        assert_agree(implementation, bucket, grad)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("capacity", [1.0, 0.25])
def test_a_sum_that_overflows_holds_the_step(implementation: Implementation, capacity: float) -> None:
    bucket = one_segment(8, capacity=capacity)
    bucket.state[0][:] = torch.tensor([3e38, 1.0, -3e38, 0.5, 3e38, 0.25, 2.0, 1.0])
    bucket.state[1].fill_(0.0)
    before = bucket.copy()
    grad = torch.tensor([3e38, 1.0, -3e38, 0.5, 3e38, 0.25, 2.0, 1.0])
    payload = assert_agree(implementation, bucket, grad)
    assert_same_state(bucket, before)  # the other sums are exact
    sent = bucket.unpack(implementation, payload)
    assert sent.isinf().sum() == bucket.layout.capacity if capacity < 1 else sent.tolist() == [INF, 0, -INF, 0, INF, 0, 0, 0]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_held_step_sends_what_is_not_finite_alone(implementation: Implementation, value_dtype: torch.dtype, feedback: bool) -> None:
    bucket = with_gaps(value_dtype=value_dtype, feedback=feedback)
    bucket.state[1].fill_(1.5)
    bucket.pack(implementation, torch.randn(bucket.numel))
    before = bucket.copy()
    grad = torch.randn(bucket.numel)
    grad[[10, 850, 2699]] = torch.tensor([NAN, INF, -INF])
    payload = assert_agree(implementation, bucket, grad)
    unpacked = bucket.unpack(implementation, payload)
    assert unpacked[10].isnan()
    assert unpacked[[850, 2699]].tolist() == [INF, -INF]
    assert unpacked.nan_to_num(0, 0, 0).count_nonzero() == 0
    torch.testing.assert_close(bucket.state[0], before.state[0], rtol=0, atol=1e-6)  # one rounding of W
    assert torch.equal(bucket.state[1], before.state[1])
    assert torch.equal(bucket.state[2], before.state[2])
    bucket.select(implementation, grad, 0.1)
    assert torch.equal(bucket.state[1], before.state[1])


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.int8])
def test_more_that_is_not_finite_than_fits(implementation: Implementation, block: int, value_dtype: torch.dtype) -> None:
    bucket = one_segment(2 * TILE + 100, block=block, capacity=0.1, value_dtype=value_dtype)
    bucket.state[0].normal_()
    bucket.state[1].fill_(2.0)
    bucket.state[2][0, 0] = 3
    grad = torch.randn(bucket.numel)
    grad[:: 3 if block > 256 else 1] = INF  # a small block cannot even count them
    assert_agree(implementation, bucket, grad)


@pytest.mark.parametrize("implementation", COMPILED)
def test_the_scale_of_a_tile_is_that_of_all_its_candidates(implementation: Implementation) -> None:
    """Also of those that a count or the capacity leaves out; a tile without a candidate has the scale 0."""
    bucket = one_segment(3 * TILE, capacity=1 / TILE, value_dtype=torch.int8)
    bucket.state[1].fill_(1.0)
    bucket.state[2][0, 0] = 1
    grad = torch.zeros(bucket.numel)
    grad[:256] = torch.arange(1, 257)  # the last cannot be counted
    grad[TILE : 2 * TILE] = 0.5
    grad[2 * TILE + 5] = -127.0
    payload = assert_agree(implementation, bucket, grad)
    chunk = chunk_view(payload, bucket.layout)
    assert torch.equal(chunk.scales, torch.tensor([256.0, 0.0, 127.0]) * (1 / 127))
    assert chunk.counts.sum() == bucket.layout.capacity == 3


@pytest.mark.parametrize("implementation", ALL)
def test_a_value_outside_the_segments_does_not_matter(implementation: Implementation) -> None:
    bucket = with_gaps()
    grad = torch.ones(bucket.numel)
    grad[[0, 750, 2705]] = NAN
    bucket.state[1].fill_(0.5)
    payload = assert_agree(implementation, bucket, grad)
    assert bucket.state[2][:, 0].tolist() == [1, 1, 1, 1]
    assert bucket.unpack(implementation, payload).isfinite().all()


@pytest.mark.parametrize("implementation", ALL)
def test_every_candidate_has_its_turn_when_not_all_fit(implementation: Implementation) -> None:
    bucket = one_segment(300, capacity=0.1, feedback=False)
    bucket.state[1].fill_(0.5)
    sent = torch.zeros(300)
    for _ in range(10):
        sent += bucket.unpack(implementation, bucket.pack(implementation, torch.ones(300)))
    # Of 255 + 44 entries that the two blocks can count 30 are sent in a step: in ten steps each once, and the first of them twice.
    assert sent.sum() == 300
    assert sent[:255].min() == 1
    assert sent.max() == 2
    assert sent[255] == 0
    assert bucket.state[2].tolist() == [[10, 300, 2700, 270]]


@pytest.mark.parametrize("implementation", COMPILED)
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    numel=st.integers(1, 900),
    capacity=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    value_dtype=st.sampled_from(VALUE_DTYPES),
    block=st.sampled_from(BLOCKS),
    chunks=st.integers(1, 3),
)
def test_nothing_is_lost(
    implementation: Implementation,
    data: st.DataObject,
    numel: int,
    capacity: float,
    value_dtype: torch.dtype,
    block: int,
    chunks: int,
) -> None:
    """The invariants of [Gupta21]: sent + residual == W, and the two are disjoint where values are exact."""
    bucket = one_segment(numel, block=block, capacity=capacity, value_dtype=value_dtype, chunks=chunks)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    for _ in range(3):
        grad = torch.randn(numel, generator=generator) * 10.0 ** data.draw(st.integers(-6, 4))
        tau = data.draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0]))
        bucket.state[1].fill_(tau)
        w = grad + bucket.state[0]
        overflow_before = bucket.state[2][0, 2].item()
        sent = bucket.unpack(implementation, assert_agree(implementation, bucket, grad))
        residual = bucket.state[0]
        assert torch.equal(sent + residual, w)
        if value_dtype == torch.float32:
            assert not ((sent != 0) & (residual != 0)).any()
            assert (sent.abs()[sent != 0] >= tau).all()
            if bucket.state[2][0, 2] == overflow_before:
                assert (residual.abs() < max(tau, 1e-45)).all()


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("segments", "chunks"), [((0, 140_000, 140_000, 20_000), 1), ((0, 40_000, 40_000, 3000), 40)])
def test_steps_of_many_tiles_and_many_pieces_agree(
    implementation: Implementation, segments: tuple[int, ...], chunks: int, value_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More groups of tiles and more pieces than are counted at a time; the second of three steps is held."""
    monkeypatch.setattr("dct_compile.triton_kernels.threshold_pack_triton.LANES", 2)
    numel = segments[-2] + segments[-1]
    bucket = Bucket(segments, numel, chunks=chunks, capacity=0.02, value_dtype=value_dtype)
    bucket.state[1].copy_(torch.tensor([2.0, 2.6]))
    for step in range(3):
        grad = torch.randn(numel, generator=torch.Generator().manual_seed(step))
        if step == 1:
            grad[[7, numel - 1]] = NAN
        assert_agree(implementation, bucket, grad)
    counters = bucket.state[2]
    assert (counters[:, 0] == 2).all()
    assert (counters[:, 1] > 0).all()
    assert counters[0, 2] > 0


INJECTED = [NAN, INF, -INF, 3.3e38, 1e-45, -1e-40, 0.0, -0.0]


@pytest.mark.parametrize("implementation", COMPILED)
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 255, 257, 1000, TILE - 1, TILE, TILE + 1, 2 * TILE + 65]), min_size=1, max_size=3),
    geometry=st.sampled_from([(1, -1), (3, -1), (3, 1), (2, 0)]),
    block=st.sampled_from(BLOCKS),
    capacity=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    value_dtype=st.sampled_from(VALUE_DTYPES),
    grad_dtype=st.sampled_from(DTYPES),
    feedback=st.booleans(),
    method=st.sampled_from(["exact", "sampled", "fixed"]),
    density=st.sampled_from([0.001, 0.05, 0.5, 1.0]),
    injected=st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from(INJECTED)), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_steps_agree(
    implementation: Implementation,
    sizes: list[int],
    geometry: tuple[int, int],
    block: int,
    capacity: float,
    value_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    feedback: bool,
    method: str,
    density: float,
    injected: list[tuple[int, float]],
    seed: int,
) -> None:
    """Whole steps of any bucket, the second with what is hard to add, the third after it."""
    segments = tuple(number for i, size in enumerate(sizes) for number in (sum(sizes[:i]) + 3 * i, size))
    bucket = Bucket(segments, sum(sizes) + 3 * len(sizes), block, *geometry, capacity, value_dtype, feedback)
    if bucket.chunk >= 0:
        bucket.numel = bucket.layout.state_numel
    twin = bucket.copy()
    generator = torch.Generator().manual_seed(seed)
    payloads = []
    for step in range(3):
        grad = torch.randn(bucket.numel, generator=generator)
        for place, value in injected if step == 1 and bucket.numel else []:
            grad[place % bucket.numel] = value
        grad = grad.to(grad_dtype)
        bucket.select(implementation, grad, density, method)
        twin.select(REFERENCE, grad, density, method)
        assert_same_state(bucket, twin)
        payloads.append(assert_agree(implementation, bucket, grad))
        twin = bucket.copy()
    gathered = torch.cat(payloads)
    assert same(bucket.unpack(implementation, gathered, grad_dtype, 3), twin.unpack(REFERENCE, gathered, grad_dtype, 3))


@pytest.mark.parametrize("implementation", ALL)
def test_over_time_everything_arrives(implementation: Implementation) -> None:
    bucket = one_segment(500, capacity=0.05, value_dtype=torch.bfloat16)
    grads = torch.randint(-8, 9, (6, 500), generator=torch.Generator().manual_seed(1)).float()  # sums are exact
    sent = torch.zeros(500)
    for grad in grads:
        bucket.select(implementation, grad, 0.02)
        sent += bucket.unpack(implementation, bucket.pack(implementation, grad))
    assert torch.equal(sent + bucket.state[0], grads.sum(0))


@pytest.mark.parametrize("implementation", ALL)
def test_nothing_kept_of_a_density_of_one_stays_behind(implementation: Implementation) -> None:
    bucket = one_segment(700, block=4096)
    grad = torch.randn(700)
    bucket.select(implementation, grad, 1.0)
    assert torch.equal(bucket.unpack(implementation, bucket.pack(implementation, grad)), grad)
    assert not bucket.state[0].any()


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("method", ["exact", "sampled", "laplace", "fixed"])
@pytest.mark.parametrize(("grad_dtype", "chunks", "chunk"), [(torch.float32, 1, -1), (torch.bfloat16, 3, -1), (torch.float16, 3, 1)])
def test_selected_thresholds(implementation: Implementation, method: str, grad_dtype: torch.dtype, chunks: int, chunk: int) -> None:
    bucket = with_gaps(chunks=chunks, chunk=chunk)
    grad = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(chunk)).to(grad_dtype)
    bucket.state[0].copy_(torch.randn(bucket.layout.state_numel, generator=torch.Generator().manual_seed(2)))
    twin = bucket.copy()
    bucket.select(implementation, grad, 0.1, method)
    twin.select(REFERENCE, grad, 0.1, method)
    torch.testing.assert_close(bucket.state[1], twin.state[1], rtol=1e-6 if method == "laplace" else 0, atol=0)
    assert bucket.state[1][1] == INF  # an empty parameter has no threshold
    if method == "exact":
        start = 0 if chunk < 0 else next(piece.state_offset for piece in bucket.layout.pieces)
        size = 700 if chunk < 0 else bucket.layout.pieces[0].numel
        offset = 5 if chunk < 0 else bucket.layout.pieces[0].grad_offset
        w = grad[offset : offset + size].float() + bucket.state[0][start : start + size]
        assert bucket.state[1][0] == w.abs().sort(descending=True).values[math.ceil(0.1 * size) - 1]


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("method", ["exact", "laplace"])
def test_thresholds_of_two_large_parameters(implementation: Implementation, method: str) -> None:
    """Each is looked at in several parts, by several programs or threads."""
    bucket = Bucket((0, 20_000, 20_000, 36_000), 56_000)
    grad = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(4))
    grad[20_000:] *= 3
    twin = bucket.copy()
    bucket.select(implementation, grad, 0.05, method)
    twin.select(REFERENCE, grad, 0.05, method)
    assert torch.allclose(bucket.state[1], twin.state[1], rtol=1e-6 if method == "laplace" else 0, atol=0)
    assert bucket.state[1][1] > 2 * bucket.state[1][0]


@pytest.mark.parametrize("implementation", ALL)
def test_sampled_threshold_looks_at_every_13th_group_of_16(implementation: Implementation) -> None:
    bucket = one_segment(860_000, feedback=False)
    grad = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(3))
    sampled = torch.arange(bucket.numel) // 16 % 13 == 0
    kept = math.ceil(0.05 * int(sampled.sum()))
    bucket.select(implementation, torch.where(sampled, grad, NAN), 0.05, "sampled")
    assert bucket.state[1].item() == grad[sampled].abs().sort(descending=True).values[kept - 1]
    assert (grad.abs() >= bucket.state[1]).float().mean().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("last", [1, 15, 16, 17, 207])
@pytest.mark.parametrize("feedback", [True, False])
def test_sampled_threshold_of_any_gradient(implementation: Implementation, last: int, feedback: bool) -> None:
    """With and without a residual; the last sampled group may be short, or have others behind it."""
    bucket = one_segment(4100 * 208 + last, feedback=feedback)
    generator = torch.Generator().manual_seed(last)
    bucket.state[0].copy_(torch.randn(bucket.numel, generator=generator))
    twin = bucket.copy()
    grad = torch.randn(bucket.numel, generator=generator).bfloat16()
    bucket.select(implementation, grad, 0.05, "sampled")
    twin.select(REFERENCE, grad, 0.05, "sampled")
    assert torch.equal(bucket.state[1], twin.state[1])
    assert bucket.state[1].isfinite().all()


SHAPES = {
    "normal": lambda grad: grad,
    "zeros": lambda grad: grad * (torch.arange(grad.numel()) % 200 == 0),
    "few values": lambda grad: grad.round(),
    "one value": torch.ones_like,
    "sorted": lambda grad: grad.sort().values,
    "stripes": lambda grad: torch.where(torch.arange(grad.numel()) % 17 == 8, 100 * grad, grad),
    "blocks": lambda grad: torch.where(torch.arange(grad.numel()) < 2000, 100 * grad, grad),
    "denormals": lambda grad: grad * 1e-42,
}


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [1e-5, 0.01, 0.3, 0.999])
def test_exact_threshold_of_a_large_parameter(implementation: Implementation, shape: str, density: float) -> None:
    bucket = one_segment(100_000 if implementation is not TRITON else 36_000)
    grad = SHAPES[shape](torch.randn(bucket.numel, generator=torch.Generator().manual_seed(4)))
    bucket.select(implementation, grad, density)
    assert bucket.state[1].item() == grad.abs().sort(descending=True).values[math.ceil(density * bucket.numel) - 1]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("method", ["exact", "sampled", "laplace", "fixed"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_threshold_stays_where_a_value_is_not_finite(implementation: Implementation, method: str, value: float) -> None:
    """Those of the other parameters are chosen, and a fixed one does not look."""
    large = 852_816 if method == "sampled" else 40_000  # the last group is the first in a row of 13
    bucket = Bucket((0, large, large, 100), large + 100)
    grad = torch.ones(bucket.numel)
    grad[large - 1] = value
    bucket.select(implementation, grad, 0.1, method)
    assert bucket.state[1].tolist() == [
        0.5 if method == "fixed" else INF,
        pytest.approx({"fixed": 0.5, "laplace": -math.log(0.1)}.get(method, 1.0)),
    ]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("warmup", ["off", "geometric"])
def test_thresholds_change_at_refresh_steps_only(implementation: Implementation, warmup: str) -> None:
    grad = torch.tensor([3.0, -2.0, 1.0])
    changed = []
    for step in [0, 1, 2, 15, 16, 17, 18, 40, 64, 72, 100, 101, 127, 128, 136, 200, 2**40, 2**40 + 24]:
        bucket = one_segment(3)
        bucket.state[2][0, 0] = step
        bucket.select(implementation, grad, 0.5, refresh_interval=50, refresh_warmup=warmup)
        if bucket.state[1].item() != INF:
            assert bucket.state[1].item() == 2.0
            changed.append(step)
    expected = {"off": [0, 100, 200, 2**40 + 24], "geometric": [0, 1, 2, 15, 16, 18, 40, 64, 72, 128, 2**40 + 24]}
    assert changed == expected[warmup]


@pytest.mark.parametrize("implementation", ALL)
def test_a_step_that_overflowed_is_followed_by_a_refresh(implementation: Implementation) -> None:
    bucket = one_segment(3)
    bucket.state[2][0] = torch.tensor([129, 5, 1, 1])
    bucket.select(implementation, torch.tensor([3.0, -2.0, 1.0]), 0.3, refresh_interval=50, refresh_warmup="geometric")
    assert bucket.state[1].item() == 3.0


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize(("dtype", "value_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("chunks", "chunk", "divisor"), [(1, -1, 1), (3, -1, 3), (3, -1, 2), (3, 1, 3)])
@pytest.mark.parametrize("block", BLOCKS)
def test_unpack_agrees(
    implementation: Implementation, value_dtype: torch.dtype, dtype: torch.dtype, chunks: int, chunk: int, divisor: int, block: int
) -> None:
    bucket = with_gaps(block=block, chunks=chunks, chunk=chunk, capacity=0.3, value_dtype=value_dtype)
    bucket.state[1].fill_(1.3)
    torch.manual_seed(divisor)
    if chunk >= 0:
        bucket.numel = bucket.layout.state_numel
    gathered = torch.cat([bucket.pack(CPU, torch.randn(bucket.numel)) for _ in range(3)])
    dense = None if divisor == 2 else torch.randn(bucket.numel - bucket.layout.state_numel)
    found = bucket.unpack(implementation, gathered, dtype, divisor, dense)
    assert torch.equal(found, bucket.unpack(REFERENCE, gathered, dtype, divisor, dense))
    assert found.dtype == dtype
    if dense is not None and chunk < 0:
        assert torch.equal(found[[0, 4, 705, 799]], dense[[0, 4, 5, 99]].to(dtype))


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("dtype", "numel"), [(torch.float32, 2**21 + 5000), (torch.bfloat16, 2**22 + 5000)])
def test_a_large_bucket_is_written_past_the_caches(dtype: torch.dtype, numel: int) -> None:
    """Over 8 MiB; no segment begins at a cache line, and the last ends within one."""
    middle = numel // 2
    bucket = Bucket((3, middle - 3, middle + 1, numel - middle - 8), numel, capacity=0.1, value_dtype=torch.bfloat16)
    bucket.state[1].fill_(2.0)
    gathered = torch.cat([bucket.pack(CPU, torch.randn(numel)) for _ in range(2)])
    dense = torch.randn(numel - bucket.layout.state_numel)
    assert torch.equal(bucket.unpack(CPU, gathered, dtype, 2, dense), bucket.unpack(REFERENCE, gathered, dtype, 2, dense))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("chunk", [-1, 0])
def test_an_empty_bucket(implementation: Implementation, chunk: int) -> None:
    for bucket in (Bucket((), 0, chunk=chunk), Bucket((0, 0), 0, chunk=chunk)):
        bucket.select(implementation, torch.empty(0), 0.1)
        payload = bucket.pack(implementation, torch.empty(0))
        assert payload.shape == (bucket.layout.payload_bytes,)
        assert bucket.unpack(implementation, payload).shape == (0,)


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("method", ["exact", "sampled", "fixed", "laplace"])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize(("block", "payloads", "feedback"), [(256, 3, True), (4096, 1, True), (WHOLE_PIECE, 2, False)])
def test_repack_agrees(
    implementation: Implementation, step: int, method: str, value_dtype: torch.dtype, block: int, payloads: int, feedback: bool
) -> None:
    """At a step that chooses a threshold (2) and at one that does not; the capacity is too small for all candidates of the first."""
    bucket = Bucket((0, 700, 700, 3 * TILE + 9), 3 * TILE + 709, block, 2, 0, 0.1, value_dtype, feedback)
    bucket.numel = bucket.layout.state_numel
    bucket.state[0].copy_(torch.randn(bucket.numel) / 4)
    bucket.state[1].copy_(torch.tensor([0.5, 2.0]))
    gathered = torch.cat([bucket.copy().pack(REFERENCE, torch.randn(bucket.numel)) for _ in range(payloads)])
    bucket.state[2][:, 0] = step
    twin = bucket.copy()
    options = {"fixed": 1.5, "refresh_interval": 2}
    found = bucket.repack(implementation, gathered, 0.05, method, **options)
    expected = twin.repack(REFERENCE, gathered, 0.05, method, **options)
    torch.testing.assert_close(bucket.state[1], twin.state[1], rtol=1e-6 if method == "laplace" else 0, atol=0)
    assert torch.equal(found, expected)
    assert same(bucket.state[0], twin.state[0])
    assert torch.equal(bucket.state[2], twin.state[2])
    assert found.any()


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.int8])
def test_repack_holds_a_step(implementation: Implementation, step: int, value_dtype: torch.dtype) -> None:
    """A payload has values that are not finite, and so has the sum of two finite ones."""
    bucket = Bucket((0, 3 * TILE), 3 * TILE, 256, 1, 0, 0.1, value_dtype)
    bucket.state[1].fill_(1.0)
    grad = torch.randn(bucket.numel)
    grad[[5, TILE]] = torch.tensor([INF, NAN])
    gathered = torch.cat([bucket.copy().pack(REFERENCE, part) for part in (grad, torch.randn(bucket.numel), torch.full_like(grad, 3e38))])
    bucket.state[0].normal_()
    bucket.state[2][:, 0] = step
    twin = bucket.copy()
    assert torch.equal(
        bucket.repack(implementation, gathered, 0.05, refresh_interval=2), twin.repack(REFERENCE, gathered, 0.05, refresh_interval=2)
    )
    assert_same_state(bucket, twin)
    assert bucket.state[2].tolist() == [[step, 0, 0, 0]]


def test_damaged_payloads_stay_within_their_segments() -> None:
    for block in BLOCKS:
        for value_dtype in VALUE_DTYPES:
            bucket = Bucket((5, 700, 800, 9000), 9811, block, 2, capacity=0.1, value_dtype=value_dtype)
            gathered = torch.randint(0, 256, (2 * bucket.layout.payload_bytes,), dtype=torch.uint8)
            dense = torch.ones(111)
            result = bucket.unpack(CPU, gathered, dense=dense)
            assert torch.equal(torch.cat([result[:5], result[705:800], result[9800:]]), dense)


@pytest.mark.parametrize(("block", "index"), [(256, [255]), (4096, [0, 8])])
def test_a_damaged_index_of_a_short_segment_reaches_no_other(block: int, index: list[int]) -> None:
    bucket = Bucket((0, 100, 100, 5000), 5100, block)
    grad = torch.zeros(5100)
    grad[3], grad[200] = 1.0, 2.0
    bucket.state[1].fill_(0.5)
    payload = bucket.pack(CPU, grad)
    first = payload[bucket.layout.indices_offset :][: len(index)]
    assert int(first[0]) == 3
    first.copy_(torch.tensor(index))  # far behind the 100 elements
    assert torch.equal(bucket.unpack(CPU, payload), grad.index_fill(0, torch.tensor(3), 0.0))


@pytest.mark.parametrize("implementation", COMPILED)
def test_a_bucket_of_more_elements_than_32_bits_can_count(implementation: Implementation) -> None:
    numel = 2**31 + 9000
    grad = torch.frombuffer(mmap.mmap(-1, 2 * numel), dtype=torch.bfloat16)  # memory that is not touched takes no room
    bucket = Bucket((numel - 5000, 5000), numel, capacity=0.2, value_dtype=torch.bfloat16)
    small = one_segment(5000, capacity=0.2, value_dtype=torch.bfloat16)
    grad[-5000:].normal_()
    bucket.select(implementation, grad, 0.1)
    small.select(REFERENCE, grad[-5000:], 0.1)
    assert torch.equal(bucket.pack(implementation, grad), small.pack(REFERENCE, grad[-5000:]))
    assert_same_state(bucket, small)
    assert bucket.state[2][0, 1] >= 500


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("value_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("capacity", [0.02, 0.1])
def test_the_number_of_threads_changes_nothing(block: int, value_dtype: torch.dtype, capacity: float) -> None:
    numel = 300_000
    bucket = Bucket((0, 250_000, 250_000, 50_000), numel, block, 2, capacity=capacity, value_dtype=value_dtype)
    owner = Bucket(bucket.segments, numel, block, 2, 0, capacity, value_dtype)
    grad = torch.randn(numel)
    spoilt = grad.index_fill(0, torch.tensor([7, 299_999]), INF)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            one, owned = bucket.copy(), owner.copy()
            one.select(CPU, grad, 0.05)
            payload = one.pack(CPU, grad)
            assert (one.state[2][:, 3] > 0).all() == (capacity < 0.05)
            results.append([payload, *one.copy().state, one.unpack(CPU, payload, divisor=3)])
            share = payload[: owner.layout.chunk_bytes].repeat(2)
            results[-1] += [owned.repack(CPU, share, 0.01, step) for step in ("exact", "laplace", "fixed")]
            results[-1] += [one.pack(CPU, spoilt), *one.state, *owned.state]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(result, results[0], strict=True))
    bucket.state[1].copy_(results[0][2])
    assert torch.equal(bucket.pack(REFERENCE, grad), results[0][0])
    assert same(bucket.state[0], results[0][1])


@pytest.mark.skipif(not HAS_TRITON or load_library() is None, reason="needs both Triton and a C++ compiler")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_a_payload_of_one_device_is_read_by_the_other(block: int, value_dtype: torch.dtype) -> None:
    """Packed on the CPU and unpacked on the GPU (in Triton's interpreter where there is none), and the reverse; mixed in one collective."""
    bucket = with_gaps(block=block, capacity=0.2, value_dtype=value_dtype)
    bucket.state[1].fill_(1.0)
    gathered = torch.cat([bucket.copy().pack(packer, torch.randn(bucket.numel)) for packer in (CPU, TRITON, CPU)])
    results = [bucket.unpack(reader, gathered, divisor=3) for reader in (CPU, TRITON)]
    assert int((results[0] != 0).sum()) > 100
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("density", "numel", "block"),
    [
        (0.01, 10**6, 256),
        (0.001, 10**6, 4096),
        (0.0002, 10**6, WHOLE_PIECE),
        (0.0002, WHOLE_PIECE, WHOLE_PIECE),
        (0.0002, WHOLE_PIECE + 1, 4096),
    ],
)
def test_block_with_the_fewest_bytes(density: float, numel: int, block: int) -> None:
    assert choose_block(density, numel) == block


def test_a_segment_too_large_for_one_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="a segment of 2147483649 elements cannot be one block"):
        gradient_layout((0, WHOLE_PIECE + 1), WHOLE_PIECE, 1, -1, 0.001, torch.float32)
