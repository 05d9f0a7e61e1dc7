"""`threshold_pack`: every implementation agrees with the PyTorch reference to the byte."""

import pytest
import torch

from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE
from dct_compile.triton_kernels.threshold_pack import chunk_view
from tests.gradient_cases import (
    ALL,
    BLOCKS,
    COMPILED,
    DTYPE_PAIRS,
    INF,
    NAN,
    REFERENCE,
    VALUE_DTYPES,
    Bucket,
    Implementation,
    assert_agree,
    assert_same_state,
    one_segment,
    same,
    with_gaps,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    bucket = Bucket(
        ((3, TILE - 1), (TILE + 2, 2 * TILE + 1)), 3 * TILE + 10, block=block, chunks=2, capacity=capacity, value_dtype=value_dtype
    )
    for tau in (0.0, 0.7):
        bucket.state[1].fill_(tau)
        assert_agree(implementation, bucket, torch.randn(bucket.numel))


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("held", [False, True])
def test_shares_of_several_tiles_agree(implementation: Implementation, block: int, held: bool) -> None:
    """Owners in turn: whole rounds and a last one with a unit that is cut, beside a parameter with fewer units than owners."""
    numel = 3 * (2 * TILE + 512) + 300
    bucket = Bucket(((5, numel), (numel + 8, 600)), numel + 610, block=block, chunks=3, capacity=0.02, value_dtype=torch.int8)
    generator = torch.Generator().manual_seed(1)
    bucket.state[0].normal_(generator=generator)
    bucket.state[1].fill_(2.0)  # of more entries than fit
    grad = torch.randn(bucket.numel, generator=generator)
    if held:
        grad[[9, 7000, numel]] = INF
    payload = assert_agree(implementation, bucket, grad)
    assert same(bucket.unpack(implementation, payload), bucket.unpack(REFERENCE, payload))


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
    assert torch.equal(bucket.state[2][:, :4], before.state[2][:, :4])
    assert not bucket.state[2][:, 4].any()  # nothing that a threshold would follow
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
    assert bucket.state[2].tolist() == [[10, 300, 2700, 270, 30]]
