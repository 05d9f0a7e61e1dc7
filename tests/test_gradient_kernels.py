"""The gradient kernels: every implementation agrees with the PyTorch reference to the byte, and the reference with [Gupta21]."""

import math
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
from dct_compile.triton_kernels.cpu.gradient import select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu
from dct_compile.triton_kernels.layout import GradientLayout, gradient_layout
from dct_compile.triton_kernels.select_threshold import select_threshold_reference
from dct_compile.triton_kernels.select_threshold_triton import select_threshold_triton
from dct_compile.triton_kernels.threshold_pack import chunk_views, threshold_pack_reference
from dct_compile.triton_kernels.threshold_pack_triton import threshold_pack_triton
from dct_compile.triton_kernels.unpack_accumulate import unpack_accumulate_reference
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_accumulate_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
]
NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Implementation:
    select: Callable[..., None]
    pack: Callable[..., Tensor]
    unpack: Callable[..., Tensor]
    device: str = "cpu"


REFERENCE = Implementation(select_threshold_reference, threshold_pack_reference, unpack_accumulate_reference)
CPU = Implementation(select_threshold_cpu, threshold_pack_cpu, unpack_accumulate_cpu)
TRITON = Implementation(select_threshold_triton, threshold_pack_triton, unpack_accumulate_triton, DEVICE)
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
    """Equal with NaN equal to NaN; of float32 also the sign of zero."""
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())


def assert_agree(implementation: Implementation, bucket: Bucket, grad: Tensor) -> Tensor:
    """One step by the implementation and by the reference: same payload, same state. ``bucket`` goes on with that state."""
    twin = bucket.copy()
    expected = twin.pack(REFERENCE, grad)
    payload = bucket.pack(implementation, grad)
    assert torch.equal(payload, expected)
    for found, wanted in zip(bucket.state, twin.state, strict=True):
        assert same(found, wanted)
    return payload


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize(("grad_dtype", "value_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("chunks", "chunk"), [(1, -1), (3, -1), (3, 1)])
def test_pack_agrees(implementation: Implementation, value_dtype: torch.dtype, grad_dtype: torch.dtype, chunks: int, chunk: int) -> None:
    bucket = with_gaps(chunks=chunks, chunk=chunk, capacity=0.08, value_dtype=value_dtype)
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
def test_pack_agrees_with_large_blocks(implementation: Implementation) -> None:
    bucket = Bucket((3, 4095, 4098, 4097), 8200, block=4096, chunks=2, capacity=0.4, value_dtype=torch.float16)
    for tau in (0.0, 0.7):
        bucket.state[1].fill_(tau)
        assert_agree(implementation, bucket, torch.randn(8200))


SPECIAL = [
    [0.5, -0.5, 0.49999997, -0.49999997, 0.50000006],  # at the threshold and next to it
    [-1.0, -2.0, -3.0, -0.1],
    [0.0, -0.0, 1e-45, -1e-45, 1.17549421e-38, 1e-30],
    [65504.0, 65519.0, 65520.0, -1e6, 3.4e38, -3.4028234e38],
    [2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 6.1e-5, 1.00390625, 1.01171875],  # float16 denormals, ties of bfloat16
    [NAN, 1.0, INF, -INF, 0.2],
    [-NAN, 0.0],
]


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("value_dtype", DTYPES)
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
def test_a_sum_that_overflows_is_sent_and_leaves_its_residual(implementation: Implementation, capacity: float) -> None:
    bucket = one_segment(8, capacity=capacity)
    bucket.state[0][:] = torch.tensor([3e38, 1.0, -3e38, 0.5, 3e38, 0.25, 2.0, 1.0])
    bucket.state[1].fill_(0.0)
    before = bucket.state[0].clone()
    grad = torch.tensor([3e38, 1.0, -3e38, 0.5, 3e38, 0.25, 2.0, 1.0])
    payload = assert_agree(implementation, bucket, grad)
    infinite = (grad + before).isinf()
    assert torch.equal(bucket.state[0][infinite], before[infinite])
    assert chunk_views(payload, bucket.layout)[0].isinf().any()


@pytest.mark.parametrize("implementation", ALL)
def test_a_held_step_sends_what_is_not_finite_and_changes_nothing(implementation: Implementation) -> None:
    bucket = with_gaps(value_dtype=torch.bfloat16)
    bucket.state[1].fill_(1.5)
    bucket.pack(implementation, torch.randn(bucket.numel))
    before = bucket.copy()
    grad = torch.randn(bucket.numel)
    grad[[10, 850, 2699]] = torch.tensor([NAN, INF, -INF])
    payload = bucket.pack(implementation, grad)
    unpacked = bucket.unpack(implementation, payload)
    assert unpacked[10].isnan()
    assert unpacked[[850, 2699]].tolist() == [INF, -INF]
    assert unpacked.nan_to_num(0, 0, 0).count_nonzero() == 0
    for found, wanted in zip(bucket.state, before.state, strict=True):
        assert torch.equal(found, wanted)
    bucket.select(implementation, grad, 0.1)
    assert torch.equal(bucket.state[1], before.state[1])


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


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    numel=st.integers(1, 900),
    capacity=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    value_dtype=st.sampled_from(DTYPES),
    chunks=st.integers(1, 3),
)
def test_nothing_is_lost(data: st.DataObject, numel: int, capacity: float, value_dtype: torch.dtype, chunks: int) -> None:
    """The invariants of [Gupta21]: sent + residual == W, and the two are disjoint where values are exact."""
    bucket = one_segment(numel, capacity=capacity, value_dtype=value_dtype, chunks=chunks)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    for _ in range(3):
        grad = torch.randn(numel, generator=generator) * 10.0 ** data.draw(st.integers(-6, 4))
        tau = data.draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0]))
        bucket.state[1].fill_(tau)
        w = grad + bucket.state[0]
        overflow_before = bucket.state[2][0, 2].item()
        sent = bucket.unpack(CPU, assert_agree(CPU, bucket, grad))
        residual = bucket.state[0]
        assert torch.equal(sent + residual, w)
        if value_dtype == torch.float32:
            assert not ((sent != 0) & (residual != 0)).any()
            assert (sent.abs()[sent != 0] >= tau).all()
            if bucket.state[2][0, 2] == overflow_before:
                assert (residual.abs() < max(tau, 1e-45)).all()


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


@pytest.mark.parametrize("implementation", ALL)
def test_sampled_threshold_of_a_large_parameter(implementation: Implementation) -> None:
    bucket = one_segment(100_000 if implementation is not TRITON else 21_000, feedback=False, block=4096)
    grad = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(3))
    twin = bucket.copy()
    bucket.select(implementation, grad, 0.05, "sampled")
    twin.select(REFERENCE, grad, 0.05, "sampled")
    assert torch.equal(bucket.state[1], twin.state[1])
    assert (grad.abs() >= bucket.state[1]).float().mean().item() == pytest.approx(0.05, rel=0.25)


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
def test_unpack_agrees(
    implementation: Implementation, value_dtype: torch.dtype, dtype: torch.dtype, chunks: int, chunk: int, divisor: int
) -> None:
    bucket = with_gaps(chunks=chunks, chunk=chunk, capacity=0.3, value_dtype=value_dtype)
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


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("chunk", [-1, 0])
def test_an_empty_bucket(implementation: Implementation, chunk: int) -> None:
    for bucket in (Bucket((), 0, chunk=chunk), Bucket((0, 0), 0, chunk=chunk)):
        bucket.select(implementation, torch.empty(0), 0.1)
        payload = bucket.pack(implementation, torch.empty(0))
        assert payload.shape == (bucket.layout.payload_bytes,)
        assert bucket.unpack(implementation, payload).shape == (0,)


def test_the_number_of_threads_changes_nothing() -> None:
    numel = 300_000
    grad = torch.randn(numel)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            bucket = Bucket((0, 200_000, 200_000, 100_000), numel, capacity=0.02, chunks=2, value_dtype=torch.bfloat16)
            bucket.select(CPU, grad, 0.05)
            payload = bucket.pack(CPU, grad)
            assert bucket.state[2][:, 3].min() > 0
            results.append((payload, *bucket.state, bucket.unpack(CPU, payload, divisor=3)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    reference = Bucket((0, 200_000, 200_000, 100_000), numel, capacity=0.02, chunks=2, value_dtype=torch.bfloat16)
    reference.state[1].copy_(results[0][2])
    assert torch.equal(reference.pack(REFERENCE, grad), results[0][0])
    assert torch.equal(reference.state[0], results[0][1])
