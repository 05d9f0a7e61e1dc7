"""quantize_rows and dequantize_rows: the compiled kernels against the reference, byte for byte, and what the codec promises."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.rows import dequantize_rows_cpu, quantize_rows_cpu
from dct_compile.triton_kernels.quantize import dequantize_rows_reference, quantize_rows_reference, uniform
from dct_compile.triton_kernels.quantize_triton import dequantize_rows_triton, quantize_rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


@dataclass(frozen=True)
class Codec:
    quantize: Callable[..., Tensor]
    dequantize: Callable[..., Tensor]
    device: str = "cpu"


REFERENCE = Codec(quantize_rows_reference, dequantize_rows_reference)
COMPILED = [
    pytest.param(
        Codec(quantize_rows_cpu, dequantize_rows_cpu),
        id="cpu",
        marks=pytest.mark.skipif(load_library() is None, reason="no C++ compiler"),
    ),
    pytest.param(
        Codec(quantize_rows_triton, dequantize_rows_triton, DEVICE),
        id="triton",
        marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton"),
    ),
]
ALL = [pytest.param(REFERENCE, id="reference"), *COMPILED]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # the interpreter's numpy, at NaN and infinity


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN or the largest integer: whoever reads or leaves them fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def edge_rows(width: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(10, width, generator=torch.Generator().manual_seed(width))
    rows[1] = 0
    rows[2, width // 2] = math.nan
    rows[3, -1] = -math.inf
    rows[4] *= 1e-40
    rows[5] = rows[5].sign() * 3.3e38
    rows[6] = rows[6].sign() * 65000
    rows[7] *= 1e-7
    rows[8] = torch.where(torch.arange(width) == 0, 5.0, -0.0)
    rows[9] = torch.where(torch.arange(width) == 0, 1.0, -1e-42)  # quotients are negative denormals
    return rows.to(dtype)


@pytest.mark.parametrize("codec", COMPILED)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_agree_to_the_byte(codec: Codec, bits: int, dtype: torch.dtype) -> None:
    for width in (1, 2, 7, 256, 1001):
        rows = edge_rows(width, dtype).reshape(5, 2, width)
        payload = quantize_rows_reference(rows, SEED, bits)
        assert torch.equal(codec.quantize(rows.to(codec.device), SEED.to(codec.device), bits).cpu(), payload)
        for out in DTYPES:
            dense = codec.dequantize(payload.to(codec.device), [2, width], bits, out).cpu()
            expected = dequantize_rows_reference(payload, [2, width], bits, out)
            torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)
            assert dense.stride() == expected.stride()


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize(("bits", "qmax"), [(8, 127), (4, 7)])
def test_no_entry_moves_by_more_than_a_scale(codec: Codec, bits: int, qmax: int) -> None:
    rows = edge_rows(65, torch.float32)
    dense = codec.dequantize(codec.quantize(rows.to(codec.device), SEED.to(codec.device), bits), [65], bits, torch.float32).cpu()
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = (largest / qmax * (1 + 2**-7)).clamp(min=2.0**-126)
    finite = rows.isfinite().all(dim=1)
    assert ((dense - rows).abs() <= scale)[finite].all()
    assert dense[~finite].isnan().all()
    assert not dense[1].any()


@pytest.mark.parametrize("codec", ALL)
def test_codes_and_scale_lie_where_they_should(codec: Codec) -> None:
    """Multiples of the scale have no rounding: 4-bit codes two's complement, the low half first, the last half of an odd width 0."""
    row = torch.tensor([[-7.0, 1.0, 3.0, -1.0, 7.0]], device=codec.device)
    seed = SEED.to(codec.device)
    assert codec.quantize(row, seed, 4).tolist() == [[0x80, 0x3F, 0x19, 0xF3, 0x07]]
    assert codec.quantize(row / 7 * 127, seed, 8)[:, :3].tolist() == [[0x80, 0x3F, 0x81]]
    # The scale is the least bfloat16 that is not below: 1.0 is one, the next float32 is not.
    above = torch.tensor([[7.000001]], device=codec.device)
    assert codec.quantize(above, seed, 4)[:, :2].tolist() == [[0x81, 0x3F]]


@pytest.mark.parametrize("codec", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_finite_stays_finite(codec: Codec, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[largest, -largest, largest]], dtype=dtype, device=codec.device)
    for bits in (8, 4):
        assert codec.dequantize(codec.quantize(rows, SEED.to(codec.device), bits), [3], bits, dtype).isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_has_no_bias(bits: int) -> None:
    """The mean over seeds is x within five standard errors, for each entry; an error's deviation is at most half a scale."""
    rows = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    seeds = 400
    mean = torch.zeros(4, 200, dtype=torch.float64)
    for seed in range(seeds):
        payload = quantize_rows_cpu(rows, torch.tensor([seed]), bits)
        mean += dequantize_rows_cpu(payload, [200], bits, torch.float32) / seeds
    scale = payload[:, :2].clone().view(torch.bfloat16).double()
    error = (mean - rows) / (scale * 0.5 / math.sqrt(seeds))
    assert error.abs().max() < 5
    assert 0.3 < error.std() < 1
    assert error.mean().abs() < 5 / math.sqrt(800)


def test_uniform_numbers_look_independent() -> None:
    """Of neighbours, of entries that share a number, of neighbouring seeds, of rows and seeds that differ in their upper halves only."""
    row, column = torch.arange(1000)[:, None], torch.arange(96)
    u = uniform(SEED, row, column, 96)
    assert -0.5 < u.min() < u.max() < 0.5
    assert u.histc(100, -0.5, 0.5).sub(960).abs().max() < 5 * math.sqrt(960)
    others = [
        uniform(SEED, row, column + 96, 96),
        uniform(SEED, row, column ^ 16, 96),
        uniform(SEED + 1, row, column, 96),
        uniform(SEED, row + 2**32, column, 96),
        uniform(SEED + 2**32, row, column, 96),
        uniform(-SEED, row, column, 96),
    ]
    for other in others:
        assert torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1].abs() < 5 / math.sqrt(96_000)


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("bits", [8, 4])
def test_results_larger_than_the_caches(bits: int) -> None:
    """They are written past the caches, in tiles that begin and end anywhere in a cache line."""
    payload = quantize_rows_cpu(torch.randn(4200, 1001, generator=torch.Generator().manual_seed(bits)), SEED, bits)
    dense = dequantize_rows_cpu(payload, [1001], bits, torch.float32)
    assert dense.nbytes > 2**24
    assert torch.equal(dense, dequantize_rows_reference(payload, [1001], bits, torch.float32))


@pytest.mark.parametrize("codec", ALL)
def test_strides_and_empty_tensors(codec: Codec) -> None:
    seed = SEED.to(codec.device)
    x = torch.randn(4, 6, 10, device=codec.device)[:, ::2].transpose(1, 2)
    payload = codec.quantize(x, seed, 8)
    assert payload.shape == (4, 10 * 5)
    assert torch.equal(payload, codec.quantize(x.contiguous(), seed, 8))
    strided = torch.cat([payload, payload], dim=1)[:, :50]
    assert torch.equal(codec.dequantize(strided, [10, 3], 8, torch.float32), codec.dequantize(payload, [10, 3], 8, torch.float32))
    assert codec.quantize(x[:0], seed, 4).shape == (0, 10 * 4)
    assert codec.dequantize(payload[:0], [10, 3], 8, torch.float16).shape == (0, 10, 3)


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    width=st.integers(1, 200),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES),
    low=st.booleans(),
)
def test_any_bits(seed: int, width: int, bits: int, dtype: torch.dtype, low: bool) -> None:
    """Rows of random bits, every one or those of small numbers only."""
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    span = torch.iinfo(integers).max // (64 if low else 1)
    rows = torch.randint(-span, span, (3, width), generator=torch.Generator().manual_seed(abs(seed)), dtype=integers).view(dtype)
    key = torch.tensor([seed])
    payload = quantize_rows_reference(rows, key, bits)
    assert torch.equal(quantize_rows_cpu(rows, key, bits), payload)
    dense = dequantize_rows_cpu(payload, [width], bits, dtype)
    torch.testing.assert_close(dense, dequantize_rows_reference(payload, [width], bits, dtype), rtol=0, atol=0, equal_nan=True)
