"""`unpack_accumulate`: sums agree with the reference to the bit, and damaged payloads do no harm."""

from collections.abc import Callable

import pytest
import torch

import dct_compile.ops  # noqa: F401  (registers torch.ops.dct)
from dct_compile.triton_kernels.compat import HAS_TRITON
from dct_compile.triton_kernels.cpu.build import load_library
from dct_compile.triton_kernels.cpu.gradient import unpack_into_cpu
from dct_compile.triton_kernels.unpack_accumulate import unpack_into_reference
from dct_compile.triton_kernels.unpack_accumulate_triton import unpack_into_triton
from tests.gradient_cases import BLOCKS, COMPILED, CPU, DTYPE_PAIRS, REFERENCE, TRITON, VALUE_DTYPES, Bucket, Implementation, with_gaps

COMPILED_INTO = [*([unpack_into_cpu] if load_library() is not None else []), *([unpack_into_triton] if HAS_TRITON else [])]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


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


@pytest.mark.parametrize("unpack_into", [unpack_into_reference, torch.ops.dct.unpack_into, *COMPILED_INTO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_dense", [True, False])
def test_memory_that_is_given_is_overwritten(unpack_into: Callable[..., None], dtype: torch.dtype, with_dense: bool) -> None:
    bucket = with_gaps(block=256, chunks=3, capacity=0.3, value_dtype=torch.bfloat16)
    bucket.state[1].fill_(1.3)
    gathered = torch.cat([bucket.pack(CPU, torch.randn(bucket.numel)) for _ in range(2)])
    dense = torch.randn(bucket.numel - bucket.layout.state_numel) if with_dense else None
    out = torch.full((bucket.numel,), float("nan"), dtype=dtype)
    version = out._version
    unpack_into(out, gathered, dense, bucket.layout, 2)
    assert torch.equal(out, bucket.unpack(REFERENCE, gathered, dtype, 2, dense))
    assert out._version == version


@pytest.mark.skipif(load_library() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("dtype", "numel"), [(torch.float32, 2**21 + 5000), (torch.bfloat16, 2**22 + 5000)])
def test_a_large_bucket_is_written_past_the_caches(dtype: torch.dtype, numel: int) -> None:
    """Over 8 MiB; no segment begins at a cache line, and the last ends within one."""
    middle = numel // 2
    bucket = Bucket(((3, middle - 3), (middle + 1, numel - middle - 8)), numel, capacity=0.1, value_dtype=torch.bfloat16)
    bucket.state[1].fill_(2.0)
    gathered = torch.cat([bucket.pack(CPU, torch.randn(numel)) for _ in range(2)])
    dense = torch.randn(numel - bucket.layout.state_numel)
    assert torch.equal(bucket.unpack(CPU, gathered, dtype, 2, dense), bucket.unpack(REFERENCE, gathered, dtype, 2, dense))


def test_damaged_payloads_stay_within_their_segments() -> None:
    for block in BLOCKS:
        for value_dtype in VALUE_DTYPES:
            bucket = Bucket(((5, 700), (800, 9000)), 9811, block, 2, capacity=0.1, value_dtype=value_dtype)
            gathered = torch.randint(0, 256, (2 * bucket.layout.payload_bytes,), dtype=torch.uint8)
            dense = torch.ones(111)
            result = bucket.unpack(CPU, gathered, dense=dense)
            assert torch.equal(torch.cat([result[:5], result[705:800], result[9800:]]), dense)


@pytest.mark.parametrize(("block", "index"), [(256, [255]), (4096, [0, 8])])
def test_a_damaged_index_of_a_short_segment_reaches_no_other(block: int, index: list[int]) -> None:
    bucket = Bucket(((0, 100), (100, 5000)), 5100, block)
    grad = torch.zeros(5100)
    grad[3], grad[200] = 1.0, 2.0
    bucket.state[1].fill_(0.5)
    payload = bucket.pack(CPU, grad)
    first = payload[bucket.layout.indices_offset :][: len(index)]
    assert int(first[0]) == 3
    first.copy_(torch.tensor(index))  # far behind the 100 elements
    assert torch.equal(bucket.unpack(CPU, payload), grad.index_fill(0, torch.tensor(3), 0.0))


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
