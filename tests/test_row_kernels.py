"""The row kernels: the reference against a slow oracle, the compiled kernels against the reference, byte for byte."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.rows import gather_rows_cpu, pack_rows_cpu, scatter_rows_cpu, unpack_rows_cpu
from dct_compile.triton_kernels.layout import RowLayout
from dct_compile.triton_kernels.row_codec import decode_rows, round_to_value
from dct_compile.triton_kernels.rows_pack import pack_rows_reference
from dct_compile.triton_kernels.rows_pack_triton import pack_rows_triton
from dct_compile.triton_kernels.rows_unpack import gather_rows_reference, scatter_rows_reference, unpack_rows_reference
from dct_compile.triton_kernels.rows_unpack_triton import gather_rows_triton, scatter_rows_triton, unpack_rows_triton
from tests.row_cases import edge_rows, oracle, tau_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = [(torch.float32, torch.float32), *((dtype, value_dtype) for dtype in DTYPES for value_dtype in DTYPES[1:])]


@dataclass(frozen=True)
class Implementation:
    pack: Callable[..., Tensor]
    unpack: Callable[..., Tensor]
    gather: Callable[..., Tensor]
    scatter: Callable[..., Tensor]
    device: str = "cpu"


REFERENCE = Implementation(pack_rows_reference, unpack_rows_reference, gather_rows_reference, scatter_rows_reference)
CPU = Implementation(pack_rows_cpu, unpack_rows_cpu, gather_rows_cpu, scatter_rows_cpu)
TRITON = Implementation(pack_rows_triton, unpack_rows_triton, gather_rows_triton, scatter_rows_triton, DEVICE)
COMPILED = [
    pytest.param(CPU, id="cpu", marks=pytest.mark.skipif(load_library() is None, reason="no C++ compiler")),
    pytest.param(TRITON, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")),
]
ALL = [pytest.param(REFERENCE, id="reference"), *COMPILED]

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter's numpy, at NaN and infinity
]
EXACT = ("exact", 1.0, 0.0)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    if found.is_floating_point():
        assert torch.equal(found.cpu().signbit() & (expected == 0), expected.signbit() & (expected == 0))


SETTINGS = [("exact", 1.0, 0.0), ("laplace", 0.2, 0.0), ("laplace", 1.0, 0.0), ("fixed", 1.0, 1.5), ("fixed", 1.0, 0.0)]


@pytest.mark.parametrize(("method", "density", "fixed"), SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_keeps_what_the_specification_says(method: str, density: float, fixed: float, dtype: torch.dtype) -> None:
    for width, capacity in [(1, 1), (7, 3), (256, 13), (257, 257)]:
        rows = edge_rows(width, dtype)
        layout = RowLayout((width,), capacity, torch.float32)
        values, indices, _ = decode_rows(pack_rows_reference(rows, layout, method, density, fixed), layout)
        for row, sent, found in zip(rows.float(), values, indices, strict=True):
            kept = oracle(row.tolist(), capacity, tau_of(row, method, density, fixed))
            assert found.tolist() == kept + [0] * (capacity - len(kept))
            torch.testing.assert_close(sent[: len(kept)], row[kept], rtol=0, atol=0, equal_nan=True)
            assert not sent[len(kept) :].any()


SHAPES = [(1, 1), (2, 1), (5, 5), (255, 12), (256, 256), (256, 13), (257, 13), (1000, 50)]


@pytest.mark.parametrize("kernels", COMPILED)
@pytest.mark.parametrize(("dtype", "value_dtype"), DTYPE_PAIRS)
def test_edges_agree_to_the_byte(kernels: Implementation, dtype: torch.dtype, value_dtype: torch.dtype) -> None:
    # The interpreter takes milliseconds for a row: Triton gets each width with one dtype pair, and each pair with one width.
    shapes = SHAPES if kernels is CPU else SHAPES[5:7] if dtype == value_dtype else SHAPES[4:5]
    for width, capacity in shapes if dtype != torch.float32 or value_dtype != torch.bfloat16 else SHAPES:
        layout = RowLayout((width,), capacity, value_dtype)
        rows = edge_rows(width, dtype).to(kernels.device)
        for how in SETTINGS if width == 256 and capacity == 13 else SETTINGS[:2]:
            assert torch.equal(kernels.pack(rows, layout, *how).cpu(), pack_rows_reference(rows.cpu(), layout, *how)), (layout, how)
        payload = pack_rows_reference(rows.cpu(), layout, *EXACT)
        sent = payload.to(kernels.device)
        grad = edge_rows(width, dtype).flip(0).contiguous()
        values = gather_rows_reference(grad, payload, layout, value_dtype)
        same(kernels.unpack(sent, layout, 1, dtype), unpack_rows_reference(payload, layout, 1, dtype))
        same(kernels.gather(grad.to(kernels.device), sent, layout, value_dtype), values)
        expected = scatter_rows_reference(values, payload, layout, 1, dtype)
        same(kernels.scatter(values.to(kernels.device), sent, layout, 1, dtype), expected)


@pytest.mark.parametrize("kernels", ALL)
@pytest.mark.parametrize("width", [4096, 65536])
def test_wide_rows(kernels: Implementation, width: int) -> None:
    row = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    row[0, -1] = 9
    layout = RowLayout((width,), width // 20, torch.float32)
    payload = kernels.pack(row.to(kernels.device), layout, *EXACT)
    dense = kernels.unpack(payload, layout, 1, torch.float32).cpu()
    cut = row.abs().flatten().kthvalue(width - layout.capacity + 1).values
    assert torch.equal(dense, torch.where(row.abs() >= cut, row, 0))


@pytest.mark.parametrize("kernels", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.02, 0.6])
def test_rows_of_falling_magnitude(kernels: Implementation, dtype: torch.dtype, density: float) -> None:
    """Where a row is cut says little about where the next one is, and many entries are kept."""
    x = torch.randn(6, 16384, generator=torch.Generator().manual_seed(9)) * 4.0 ** -torch.arange(6)[:, None]
    x = x.to(dtype)
    arguments = (RowLayout((16384,), int(density * 16384), torch.bfloat16), *EXACT)
    expected = pack_rows_reference(x, *arguments)
    assert torch.equal(kernels.pack(x.to(kernels.device), *arguments).cpu(), expected)


@pytest.mark.parametrize("kernels", ALL)
def test_the_gradient_has_the_mask_of_the_forward(kernels: Implementation) -> None:
    rows = edge_rows(256, torch.float32)[:8].to(kernels.device)
    layout = RowLayout((256,), 13, torch.bfloat16)
    payload = kernels.pack(rows, layout, *EXACT)
    dense = kernels.unpack(payload, layout, 1, torch.float32)
    grad = torch.ones(8, 256, dtype=torch.bfloat16, device=kernels.device)
    values = kernels.gather(grad, payload, layout, torch.bfloat16)
    back = kernels.scatter(values, payload, layout, 1, torch.float32)
    assert torch.equal(back != 0, dense != 0)
    assert back.sum() == dense.count_nonzero() > 40


@pytest.mark.parametrize("kernels", ALL)
def test_a_first_value_that_rounds_to_zero_is_invalid_on_both_ends(kernels: Implementation) -> None:
    rows = torch.tensor([[0, 1e-9, 2.0, 1e-9], [0, 0, 0, 1e-9], [-1e-9, 0, 0, 5]], device=kernels.device)
    layout = RowLayout((4,), 3, torch.float16)
    payload = kernels.pack(rows, layout, *EXACT)
    values = kernels.gather(torch.full((3, 4), 7.0, device=kernels.device), payload, layout, torch.float32)
    back = kernels.scatter(values, payload, layout, 1, torch.float32)
    assert values.tolist() == [[0, 7, 7], [0, 0, 0], [0, 7, 0]]
    assert back.tolist() == [[0, 0, 7, 7], [0, 0, 0, 0], [0, 0, 0, 7]]
    assert kernels.unpack(payload, layout, 1, torch.float32).tolist() == [[0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 5]]


@pytest.mark.parametrize("kernels", ALL)
@pytest.mark.parametrize("addends", [1, 2, 3, 4])
def test_addends_are_summed_in_order_in_float32(kernels: Implementation, addends: int) -> None:
    """The order shows: 1e8 + 1 - 1e8 is 0 in float32."""
    factors = [1e8, 1.0, -1e8, 0.25][:addends]
    base = torch.tensor([[[1.0, 0, -2, 0], [0, 0, 0, 3]], [[0, 4, 0, 0], [5, 6, 7, 8]]])
    rows = torch.cat([base * factor for factor in factors]).to(kernels.device)
    layout = RowLayout((2, 4), 3, torch.float32)
    payload = kernels.pack(rows, layout, *EXACT)
    expected = torch.zeros_like(base)
    for factor in factors:
        expected += torch.where((base == 5), 0, base) * factor
    for dtype in DTYPES:
        same(kernels.unpack(payload, layout, addends, dtype), expected.to(dtype))
    # Backward of that sum: every payload block reads the same gradient rows.
    grad = torch.arange(1.0, 17.0, device=kernels.device).reshape(2, 2, 4)
    values = kernels.gather(grad, payload, layout, torch.bfloat16)
    assert values.shape == (2 * addends, 2 * 3)
    assert values[-2:].tolist() == [[1, 3, 0, 8, 0, 0], [10, 0, 0, 14, 15, 16]]
    # Scatter sums values over one mask.
    parts = torch.cat([values[-2:].float() * factor for factor in factors])
    summed = kernels.scatter(parts, payload[:2], layout, addends, torch.float32)
    expected = torch.zeros_like(base)
    for factor in factors:
        expected += torch.where((base != 0) & (base != 5), grad.cpu(), 0) * factor
    same(summed, expected)


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("addends", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_results_larger_than_the_caches(dtype: torch.dtype, addends: int) -> None:
    """They are written past the caches, in tiles that begin and end anywhere in a cache line."""
    width, rows = 1001, 8500
    layout = RowLayout((width,), 50, torch.bfloat16)
    generator = torch.Generator().manual_seed(addends)
    payload = pack_rows_cpu(torch.randn(addends * rows, width, generator=generator), layout, *EXACT)
    dense = unpack_rows_cpu(payload, layout, addends, dtype)
    assert dense.nbytes > 2**24
    same(dense, unpack_rows_reference(payload, layout, addends, dtype))
    grad = torch.randn(rows, width, generator=generator).to(dtype)
    values = gather_rows_cpu(grad, payload, layout, torch.bfloat16)
    same(values, gather_rows_reference(grad, payload, layout, torch.bfloat16))
    back = scatter_rows_cpu(values, payload[:rows], layout, addends, dtype)
    same(back, scatter_rows_reference(values, payload[:rows], layout, addends, dtype))


@pytest.mark.parametrize("kernels", ALL)
def test_strides_and_empty_tensors(kernels: Implementation) -> None:
    x = torch.randn(3, 8, 3, 5, device=kernels.device).to(torch.bfloat16)
    for view in (x.transpose(1, 3), x[:, ::2].transpose(1, 3), x[:, :, 0].transpose(0, 1)[:, 1:3].transpose(1, 2)):
        layout = RowLayout(tuple(view.shape[1:]), view.shape[-1] // 2, torch.bfloat16)
        payload = kernels.pack(view, layout, *EXACT)
        assert torch.equal(payload, kernels.pack(view.contiguous(), layout, *EXACT))
        strided = torch.cat([payload, payload], dim=1)[:, : payload.shape[1]]
        dense = kernels.unpack(strided, layout, 1, torch.float32)
        assert torch.equal(dense, view.float() * (dense != 0))
        assert dense.count_nonzero() == view[..., 0].numel() * layout.capacity
        values = kernels.gather(view, strided, layout, torch.float32)
        assert torch.equal(kernels.scatter(values, strided, layout, 1, torch.float32), dense)
    layout = RowLayout((8, 3, 5), 2, torch.float16)
    empty = kernels.pack(x[:0], layout, *EXACT)
    assert empty.shape == (0, 8 * 3 * 2 * 3)
    assert kernels.unpack(empty, layout, 3, torch.float32).shape == (0, 8, 3, 5)
    assert kernels.gather(x[:0], empty, layout, torch.float32).shape == (0, 48)
    assert kernels.scatter(torch.zeros(0, 48, device=kernels.device), empty, layout, 3, torch.bfloat16).shape == (0, 8, 3, 5)


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), width=st.integers(1, 300), dtypes=st.sampled_from(DTYPE_PAIRS))
def test_any_bits(data: st.DataObject, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Rows of random bits, narrow ranges of them for ties, through pack and back."""
    dtype, value_dtype = dtypes
    layout = RowLayout((width,), data.draw(st.integers(1, width)), value_dtype)
    how = data.draw(st.sampled_from(SETTINGS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    bits = 8 * dtype.itemsize
    spread = data.draw(st.sampled_from([2, 40, 2 ** (bits - 1)]))
    base = data.draw(st.sampled_from([0, 0x7F7FFFF0 if bits == 32 else 0x7BF0, 0x3F800000 if bits == 32 else 0x3C00]))
    integers = (base + torch.randint(0, spread, (4, width), generator=generator)) % 2 ** (bits - 1)
    integers -= torch.randint(0, 2, (4, width), generator=generator) * 2 ** (bits - 1)
    rows = integers.to(torch.int32 if bits == 32 else torch.int16).view(dtype)
    payload = pack_rows_reference(rows, layout, *how)
    assert torch.equal(pack_rows_cpu(rows, layout, *how), payload)
    dense = unpack_rows_cpu(payload, layout, 1, torch.float32)
    same(dense, unpack_rows_reference(payload, layout, 1, torch.float32))
    sent = round_to_value(rows.float(), value_dtype).float()
    torch.testing.assert_close(dense, torch.where(dense != 0, sent, 0.0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernels", ALL)
def test_a_damaged_payload_stays_in_its_row(kernels: Implementation) -> None:
    layout = RowLayout((100,), 4, torch.bfloat16)
    payload = torch.full((3, 4 * (2 + 1)), 255, dtype=torch.uint8, device=kernels.device)
    assert not kernels.unpack(payload, layout, 1, torch.float32).any()
    assert not kernels.gather(torch.ones(3, 100, device=kernels.device), payload, layout, torch.float32).any()
    values = torch.ones(3, 4, device=kernels.device)
    assert not kernels.scatter(values, payload, layout, 1, torch.float32).any()
