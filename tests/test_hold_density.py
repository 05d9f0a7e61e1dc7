"""`hold`: between two choices a threshold follows what the step before has kept, so that the achieved density stays at its target."""

import pytest
import torch
from torch import Tensor

from dct_compile.triton_kernels.layout import TILE
from tests.gradient_cases import ALL, COMPILED, CPU, INF, NAN, REFERENCE, Bucket, Implementation, assert_same_state, one_segment

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HELD = {"refresh_interval": 1000, "refresh_warmup": "off", "hold": True}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("density", "overflow", "kept", "expected"),
    [
        (0.1, 0, 100, 2.0),
        (0.1, 0, 40, 2.0 * 940 / 1000),
        (0.1, 0, 1, 2.0 * 901 / 1000),
        (0.1, 0, 0, 2.0),  # all W may be zero
        (0.1, 30, 110, 2.0 * 1040 / 1000),
        (0.1, 300, 110, 2.0 * 1100 / 1000),
        (0.5, 0, 900, 2.0 * 1400 / 1000),
        (0.004, 0, 8, 2.0 * 1004 / 1000),
        (0.003, 0, 6, 2.0),  # three wanted entries are too few
        (1.0, 0, 40, 0.0),
    ],
)
def test_a_threshold_follows_the_step_before(
    implementation: Implementation, density: float, overflow: int, kept: int, expected: float
) -> None:
    bucket = one_segment(1000)
    bucket.state[1].fill_(2.0)
    bucket.state[2][0] = torch.tensor([129, 500, overflow, overflow, kept])
    bucket.select(implementation, torch.full((1000,), NAN), density, **HELD)  # the gradient is not looked at
    assert bucket.state[1].item() == torch.tensor(expected).item()


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    ("counters", "options", "expected"),
    [
        ([129, 500, 0, 0, 1], {"hold": False}, 2.0),
        ([129, 500, 0, 0, 1], {"method": "fixed"}, 0.5),
        ([1000, 500, 0, 0, 1], {}, 3.0),  # due
        ([129, 500, 9, 9, 8], {"refresh_warmup": "geometric"}, 3.0),  # due: more waited than were sent
        ([129, 500, 8, 8, 8], {"refresh_warmup": "geometric"}, 2.0 * 1.1),
        ([129, 500, 1, 1, 8], {"refresh_warmup": "geometric", "hold": False}, 3.0),
    ],
)
def test_what_else_decides_a_threshold(
    implementation: Implementation, counters: list[int], options: dict[str, object], expected: float
) -> None:
    bucket = one_segment(80)
    bucket.state[1].fill_(2.0)
    bucket.state[2][0] = torch.tensor(counters)
    arguments = {"method": "exact", **HELD, **options}
    bucket.select(implementation, torch.full((80,), 3.0), 0.1, **arguments)  # type: ignore[arg-type]
    assert bucket.state[1].item() == torch.tensor(expected).item()


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize(("chunks", "chunk"), [(1, -1), (3, -1), (3, 1)])
@pytest.mark.parametrize(("method", "warmup"), [("exact", "off"), ("exact", "geometric"), ("laplace", "off")])
def test_implementations_agree(implementation: Implementation, chunks: int, chunk: int, method: str, warmup: str) -> None:
    """Steps that are due and steps that are not, one of them held, and a capacity that is too small for some; bit for bit."""
    bucket = Bucket(((0, 700), (700, 0), (703, 30), (733, 1000)), 1733, 256, chunks, chunk, 0.06, torch.bfloat16)
    if chunk >= 0:
        bucket.numel = bucket.layout.state_numel
    generator = torch.Generator().manual_seed(3)
    thresholds = []
    for step in range(8):
        grad = torch.randn(bucket.numel, generator=generator) * (4.0 if step == 5 else 1.0)
        if step == 4:
            grad[7] = INF
        bucket.state[2][:, 0] += 33 if step else 0  # most steps are not due
        twin = bucket.copy()
        how = {"refresh_interval": 50, "refresh_warmup": warmup, "hold": True}
        bucket.select(implementation, grad, 0.05, method, **how)
        twin.select(REFERENCE, grad, 0.05, method, **how)
        assert torch.allclose(bucket.state[1], twin.state[1], rtol=1e-6 if method == "laplace" else 0, atol=0)
        bucket.state[1].copy_(twin.state[1])
        payloads = bucket.pack(implementation, grad), twin.pack(REFERENCE, grad)
        assert torch.equal(*payloads)
        assert_same_state(bucket, twin)
        thresholds.append(bucket.state[1][0].item())
    assert len(set(thresholds)) >= 4


@pytest.mark.parametrize("implementation", COMPILED)
def test_the_threshold_of_a_sum_follows_too(implementation: Implementation) -> None:
    """The tiles of the owner's sum are packed with the threshold of this step, not that of the one before."""
    bucket = Bucket(((0, 2 * TILE), (2 * TILE, 900)), 2 * TILE + 900, 256, 2, 0, 0.2, torch.bfloat16)
    bucket.numel = bucket.layout.state_numel
    bucket.state[1].fill_(1.2)
    bucket.state[2].copy_(torch.tensor([[33, 900, 0, 0, 2000], [33, 10, 0, 0, 10]]))
    gathered = torch.cat([bucket.copy().pack(REFERENCE, torch.randn(bucket.numel)) for _ in range(2)])
    twin, plain = bucket.copy(), bucket.copy()
    payload = bucket.repack(implementation, gathered, 0.1, **HELD)
    assert torch.equal(payload, twin.repack(REFERENCE, gathered, 0.1, **HELD))
    assert_same_state(bucket, twin)
    assert bucket.state[1][0] == pytest.approx(1.2 * 1.1, rel=1e-3)
    assert not torch.equal(payload, plain.repack(REFERENCE, gathered, 0.1, refresh_interval=1000))


@pytest.mark.parametrize("implementation", ALL)
def test_a_held_step_in_between_changes_no_step_after_it(implementation: Implementation) -> None:
    grads = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    spoilt = grads[0].index_fill(0, torch.tensor([3]), NAN)
    ends = []
    for steps in (grads, [*grads[:2], spoilt, spoilt, *grads[2:]]):
        bucket = one_segment(1000, capacity=0.2)
        for grad in steps:
            bucket.select(implementation, grad.round(), 0.1, **HELD)
            bucket.pack(implementation, grad.round())  # sums are exact
        ends.append(bucket)
    assert_same_state(*ends)


def walk(steps: int, numel: int) -> list[Tensor]:
    """Gradients of parameters of different scales, with a part that stays from step to step and fades as a training goes on."""
    generator = torch.Generator().manual_seed(7)
    scale = torch.randn(numel, generator=generator).exp()
    drift, grads = torch.zeros(numel), []
    for step in range(steps):
        drift = 0.98 * drift + 0.2 * torch.randn(numel, generator=generator)
        grads.append((torch.randn(numel, generator=generator) + drift) * scale / (1 + step / 100) ** 0.5)
    return grads


def achieved(bucket: Bucket, grads: list[Tensor], **options: object) -> list[float]:
    densities = []
    for grad in grads:
        before = bucket.state[2][:, 1].sum()
        bucket.select(CPU, grad, 0.02, **options)  # type: ignore[arg-type]
        bucket.pack(CPU, grad)
        densities.append((bucket.state[2][:, 1].sum() - before).item() / bucket.numel)
    return densities


@pytest.mark.parametrize(("warmup", "without"), [("geometric", 0.0162), ("off", 0.022)])
def test_the_density_is_held(warmup: str, without: float) -> None:
    """Without, it falls as the gradients do, or the payload is full because the first threshold was too low."""
    grads = walk(400, 20_000)
    options = {"refresh_interval": 1000, "refresh_warmup": warmup}
    means = []
    for hold in (False, True):
        found = achieved(one_segment(20_000, capacity=0.022, value_dtype=torch.bfloat16), grads, hold=hold, **options)
        means.append(sum(found[100:]) / 300)
    assert means == [pytest.approx(without, rel=0.03), pytest.approx(0.019, rel=0.02)]


@pytest.mark.parametrize("numel", [200, 2000, 20_000])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("warmup", ["geometric", "off"])
def test_a_threshold_outlasts_fifty_steps_without_gradients(numel: int, feedback: bool, warmup: str) -> None:
    """It neither runs to zero nor to infinity, and the density is soon what it was."""
    grads = walk(180, numel)
    grads[60:110] = [torch.zeros(numel)] * 50
    bucket = one_segment(numel, capacity=0.022, value_dtype=torch.bfloat16, feedback=feedback)
    options = {"refresh_interval": 1000, "refresh_warmup": warmup, "hold": True}
    achieved(bucket, grads[:60], **options)
    before = bucket.state[1].item()
    achieved(bucket, grads[60:110], **options)
    if feedback or warmup == "off":  # a refresh may find nothing but zeros
        assert before / 3 < bucket.state[1].item() < before * 2
    found = achieved(bucket, grads[110:], **options)
    assert before / 3 < bucket.state[1].item() < before * 3
    assert 0.01 < sum(found[20:]) / len(found[20:]) <= 0.0225


def test_a_parameter_without_gradients_keeps_its_threshold() -> None:
    """Its residual is empty as well."""
    bucket = one_segment(1000, feedback=False)
    bucket.state[1].fill_(0.5)
    bucket.state[2][0] = torch.tensor([1, 100, 0, 0, 100])
    achieved(bucket, [torch.zeros(1000)] * 500, **HELD)
    assert bucket.state[1].item() > 0.5
