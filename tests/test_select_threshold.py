"""`select_threshold`: thresholds are those of the reference, and change at the steps that refresh them."""

import math

import pytest
import torch

from tests.gradient_cases import ALL, COMPILED, INF, NAN, REFERENCE, TRITON, Bucket, Implementation, one_segment, with_gaps

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    bucket = Bucket(((0, 20_000), (20_000, 36_000)), 56_000)
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
    bucket = Bucket(((0, large), (large, 100)), large + 100)
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
    bucket.state[2][0] = torch.tensor([129, 5, 1, 1, 2])
    bucket.select(implementation, torch.tensor([3.0, -2.0, 1.0]), 0.3, refresh_interval=50, refresh_warmup="geometric")
    assert bucket.state[1].item() == 3.0
