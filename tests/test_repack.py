"""`repack`: the payload of a sum of payloads is that of the reference."""

import pytest
import torch

from dct_compile.triton_kernels.layout import TILE, WHOLE_PIECE
from tests.gradient_cases import COMPILED, INF, NAN, REFERENCE, VALUE_DTYPES, Bucket, Implementation, assert_same_state, same

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("method", ["exact", "sampled", "fixed", "laplace"])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize(("block", "payloads", "feedback"), [(256, 3, True), (4096, 1, True), (WHOLE_PIECE, 2, False)])
def test_repack_agrees(
    implementation: Implementation, step: int, method: str, value_dtype: torch.dtype, block: int, payloads: int, feedback: bool
) -> None:
    """At a step that chooses a threshold (2) and at one that does not; the capacity is too small for all candidates of the first."""
    bucket = Bucket(((0, 700), (700, 3 * TILE + 9)), 3 * TILE + 709, block, 2, 0, 0.1, value_dtype, feedback)
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
    bucket = Bucket(((0, 3 * TILE),), 3 * TILE, 256, 1, 0, 0.1, value_dtype)
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
    assert bucket.state[2].tolist() == [[step, 0, 0, 0, 0]]
